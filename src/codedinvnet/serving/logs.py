"""Moved to `codedinvnet.net.logs`."""

from codedinvnet.net.logs import (
    LASTING as LASTING,
)
from codedinvnet.net.logs import (
    QUIET as QUIET,
)
from codedinvnet.net.logs import (
    JsonLines as JsonLines,
)
from codedinvnet.net.logs import (
    Lasting as Lasting,
)
from codedinvnet.net.logs import (
    Quiet as Quiet,
)
from codedinvnet.net.logs import (
    log_event as log_event,
)
from codedinvnet.net.logs import (
    logger as logger,
)
