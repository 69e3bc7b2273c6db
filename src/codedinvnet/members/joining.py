"""What a gateway or a transport does to decide as one with others."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from codedinvnet.driver import FrontEnd
from codedinvnet.members.links import Links, bind_in
from codedinvnet.members.member import Member, Upstreamed
from codedinvnet.members.wire import PROTOCOL
from codedinvnet.net.guard import Token
from codedinvnet.net.resolve import Resolver
from codedinvnet.scheduler.scheduler import Scheduler


class Joins(FrontEnd, Upstreamed, Protocol):
    """Carries actions out at upstreams that others have as well."""


def member_for(make: Callable[[], Scheduler], front_end: Joins) -> Member:
    """Return a front end's part in deciding."""
    name = secrets.randbits(31)
    return Member(name, time.time(), make, front_end, front_end)


def digest(common: Mapping[str, object]) -> str:
    """Return a digest of what members must have in common."""
    return hashlib.sha256(json.dumps(common, default=str).encode()).hexdigest()


async def join_in(folder: Path, member: Member, common: str, resolver: Resolver) -> Links:
    """Have processes of this machine decide as one from now on.

    Args:
        folder: where each has a Unix socket.
        member: of this process.
        common: digest of what all must have in common.
        resolver: of this process.

    Raises:
        OSError: if the folder cannot be used.
    """
    links = Links(member, [folder], common, told(), Token(None), resolver)
    await links.start(bind_in(folder, f"{member.name:08x}"))
    return links


def told() -> str:
    """Return what a member says of its version."""
    return f"{version('codedinvnet')}, protocol {PROTOCOL}"
