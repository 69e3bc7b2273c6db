"""Moved to `codedinvnet.net.tls`."""

from codedinvnet.net.tls import (
    Certificate as Certificate,
)
from codedinvnet.net.tls import (
    Renewal as Renewal,
)
from codedinvnet.net.tls import (
    follow as follow,
)
from codedinvnet.net.tls import (
    read_certificate as read_certificate,
)
