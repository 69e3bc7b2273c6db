"""Print how hedging fares in front of upstreams that queue: `python -m tests.scheduler`."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from tests.scheduler.upstreams import Cell, Run

CELLS = (
    ("block", 0.4, 1),
    ("block", 0.4, 2),
    ("block", 0.52, 2),
    ("block", 0.7, 2),
    ("long", 0.4, 1),
    ("long", 0.7, 1),
    ("exponential", 0.9, 2),
    ("none", 0.9, 2),
    ("all-slow", 0.2, 1),
    ("slow", 0.4, 2),
    ("none", 0.9, None),
    ("block", 0.4, None),
)

print("fault, busy, slots (None: found), policy, p50 ms, p90, p99, p99.9, work")
for (fault, busy, slots), policy in product(CELLS, ("queue", "uncoded", "hedge")):
    cell = Cell(fault, busy, policy, slots)  # type: ignore[arg-type]
    print(fault, busy, slots, policy, *Run(replace(cell)).run().row, sep=", ", flush=True)
