"""Machines of their own for processes: network namespaces on two bridges (Linux, root)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

PUBLIC, PRIVATE = (f"198.{net}.{os.getpid() % 256}" for net in (18, 19))
"""The networks of clients and upstreams, and of members (RFC 2544: for benchmarks)."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machine:
    """A namespace with an address in each network.

    Attributes:
        public, private: its addresses.
        command: runs what follows it there.
    """

    def __init__(self, number: int) -> None:
        self.name = f"m{number}-{os.getpid()}"
        self.public, self.private = (f"{net}.{number + 10}" for net in (PUBLIC, PRIVATE))
        self.command = ("ip", "netns", "exec", self.name)

    def cut(self, isolated: bool) -> None:
        """Cut it off the private network, or connect it again."""
        ip("link", "set", f"1{self.name}", "down" if isolated else "up")


@contextmanager
def machines(count: int) -> Iterator[tuple[str, list[Machine]]]:
    """Make machines; yield this one's address in the public network, and them."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    bridges = [f"b{net}-{os.getpid()}" for net in (0, 1)]
    made = [Machine(number) for number in range(count)]
    with ExitStack() as stack:
        for bridge in bridges:
            ip("link", "add", bridge, "type", "bridge")
            stack.callback(ip, "link", "del", bridge)
            ip("link", "set", bridge, "up")
        ip("address", "add", f"{PUBLIC}.1/24", "dev", bridges[0])
        for one in made:
            ip("netns", "add", one.name)
            stack.callback(ip, "netns", "del", one.name)
            ip("-n", one.name, "link", "set", "lo", "up")
            for net, address in enumerate((one.public, one.private)):
                outer, inner = f"{net}{one.name}", f"eth{net}"
                peer = ("peer", "name", inner, "netns", one.name)
                ip("link", "add", outer, "type", "veth", *peer)
                stack.callback(ip, "link", "del", outer)  # a namespace goes later than its name
                ip("link", "set", outer, "master", bridges[net], "up")
                ip("-n", one.name, "address", "add", f"{address}/24", "dev", inner)
                ip("-n", one.name, "link", "set", inner, "up")
        yield f"{PUBLIC}.1", made
