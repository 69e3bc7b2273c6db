"""Moved to `codedinvnet.net.background`."""

from codedinvnet.net.background import (
    Background as Background,
)
from codedinvnet.net.background import (
    in_thread as in_thread,
)
from codedinvnet.net.background import (
    log_error as log_error,
)
