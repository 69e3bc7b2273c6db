"""Moved to `codedinvnet.net.alarm`."""

from codedinvnet.net.alarm import (
    LAG_PERIOD as LAG_PERIOD,
)
from codedinvnet.net.alarm import (
    TURNS as TURNS,
)
from codedinvnet.net.alarm import (
    Alarm as Alarm,
)
from codedinvnet.net.alarm import (
    CatchUp as CatchUp,
)
from codedinvnet.net.alarm import (
    watch as watch,
)
