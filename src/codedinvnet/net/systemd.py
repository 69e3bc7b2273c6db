"""What systemd hands over and is told, or whoever else keeps the sockets while servers change.

See sd_listen_fds(3) and sd_notify(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any, NamedTuple, TypeVar

from codedinvnet.common.errors import UserError
from codedinvnet.common.options import Options
from codedinvnet.net.listening import prepare

Kind = TypeVar("Kind", bound=Options)
FIRST = 3
"""The number of the first file that is handed over."""
ADMIN = "admin"


class Inherited(NamedTuple):
    """The listening sockets that a process was started with; None: it binds its own."""

    main: socket.socket | None = None
    admin: socket.socket | None = None
    """That of the name `admin`."""

    def fitted(self, options: Kind) -> Kind:
        """Return options with the addresses of these sockets."""
        found: dict[str, Any] = {}
        if self.main is not None:
            found["host"], found["port"] = self.main.getsockname()[:2]
        if self.admin is not None:
            found["admin_port"] = self.admin.getsockname()[1]
        return options.model_copy(update=found)


NO_SOCKETS = Inherited()


def inherited() -> Inherited:
    """Take the sockets that are meant for this process; processes that it starts get none.

    Raises:
        UserError: if they are none that a server listens on.
    """
    given = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if given["PID"] != str(os.getpid()):
        return NO_SOCKETS
    names = given["FDNAMES"].split(":")
    found: dict[str, socket.socket] = {}
    for index in range(int(given["FDS"])):
        os.set_inheritable(FIRST + index, False)
        listener = socket.socket(fileno=FIRST + index)
        name = ADMIN if names[index : index + 1] == [ADMIN] else "main"
        if listener.family not in (socket.AF_INET, socket.AF_INET6) or name in found:
            raise UserError(
                "sockets: one TCP address is needed, and a second one only with "
                f"FileDescriptorName={ADMIN}"
            )
        prepare(listener)
        found[name] = listener
    return Inherited(**found)


def notify(state: str) -> None:
    """Tell the service manager how this process is, if there is one that listens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own, contextlib.suppress(OSError):
            own.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
