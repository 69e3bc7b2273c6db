"""The clock of the simulation."""

from __future__ import annotations

from codedinvnet.simulation.clock import Clock


def test_calls_are_made_in_order_of_time_then_of_asking() -> None:
    clock, calls = Clock(), list[tuple[str, float]]()

    def call(name: str) -> None:
        calls.append((name, clock.now))
        if name == "first":
            clock.after(-1.0, call, "overdue")

    for seconds, name in ((2.0, "last"), (1.0, "first"), (1.0, "second")):
        clock.after(seconds, call, name)
    for _ in range(4):
        clock.step()
    assert calls == [("first", 1.0), ("second", 1.0), ("overdue", 1.0), ("last", 2.0)]
