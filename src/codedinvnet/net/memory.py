"""One bound for what requests hold, from their first byte to the last of their answers."""

from __future__ import annotations


class Memory:
    """Counts the bytes of requests, and of answers that wait for their readers.

    Args:
        most: bytes. When seven eighths are used, new requests are refused, and answers are read no
            faster than their clients take them; the rest is for those that are on their way.

    Attributes:
        used: bytes that are held now.
        peak: the most that were.
    """

    __slots__ = ("most", "peak", "used")

    def __init__(self, most: int) -> None:
        self.most, self.used, self.peak = most, 0, 0

    @property
    def is_full(self) -> bool:
        """Whether new requests are to be refused."""
        return 8 * self.used >= 7 * self.most

    @property
    def is_short(self) -> bool:
        """Whether another large request, of an eighth of the memory, would fill it."""
        return 4 * self.used >= 3 * self.most

    def is_full_for(self, own: int) -> bool:
        """Return whether a request that holds some bytes already may hold no more."""
        return self.used > self.most or 8 * (self.used - own) >= 7 * self.most

    def take(self, size: int) -> None:
        """Count bytes that are held from now on."""
        self.used += size
        if self.used > self.peak:
            self.peak = self.used

    def give(self, size: int) -> None:
        """Count bytes that are no longer held."""
        self.used -= size


class Account:
    """What one connection holds besides the bodies of its requests.

    Args:
        memory: counts it, until another does.

    Attributes:
        held: bytes.
    """

    __slots__ = ("_memory", "held")

    def __init__(self, memory: Memory) -> None:
        self._memory, self.held = memory, 0

    def take(self, size: int) -> None:
        """Count bytes that are held from now on."""
        self.held += size
        self._memory.take(size)

    def give(self, size: int) -> None:
        """Count bytes that are no longer held."""
        self.held -= size
        self._memory.give(size)

    def move(self, memory: Memory) -> None:
        """Have another memory count what is held."""
        self._memory.give(self.held)
        memory.take(self.held)
        self._memory = memory
