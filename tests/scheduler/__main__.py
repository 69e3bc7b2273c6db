"""How hedging fares in front of modelled upstreams that queue: `python -m tests.scheduler -h`."""

from __future__ import annotations

import argparse
from itertools import product
from statistics import geometric_mean
from typing import get_args

from tests.scheduler.upstreams import Cell, Fault, Run

BUSY = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)
POLICIES = ("queue", "uncoded", "hedge")

parser = argparse.ArgumentParser(
    prog="python -m tests.scheduler",
    description="Print latencies at modelled upstreams: those of a queue as HAProxy has it, which "
    "is told how many requests a server computes at once, and of this scheduler, which finds out.",
)
parser.add_argument("--fault", nargs="+", choices=get_args(Fault), default=get_args(Fault))
parser.add_argument("--busy", nargs="+", type=float, default=BUSY, metavar="SHARE")
parser.add_argument("--upstreams", type=int, default=8)
parser.add_argument("--cores", type=int, default=1, help="requests that a server computes at once")
parser.add_argument("--slots", type=int, help="of this scheduler (found)")
parser.add_argument(
    "--length", type=float, default=10.0, help="of long requests, to that of others"
)
parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
options = parser.parse_args()

counts = {name: 0 for name in (*("p50", "p90", "p99", "p99.9"), "all four")}
cells = list(product(options.fault, options.busy))
print("fault, busy: p50 ms, p90, p99, p99.9, work of each policy; means of the seeds")
for fault, busy in cells:
    rows = {}
    for policy in POLICIES:
        slots = options.cores if policy == "queue" else options.slots
        runs = [
            Run(
                Cell(
                    *(fault, busy, policy, slots, options.upstreams),
                    seed=seed,
                    cores=options.cores,
                    length=options.length,
                )
            ).run()
            for seed in options.seeds
        ]
        rows[policy] = [
            geometric_mean(column) for column in zip(*(run.row for run in runs), strict=True)
        ]
    told = [
        f"{name} {' '.join(f'{ms:.0f}' for ms in row[:4])} {row[4]:.3f}"
        for name, row in rows.items()
    ]
    print(f"{fault}, {busy:g}:", " | ".join(told), flush=True)
    limits = (1.15, 1.15, 1.1, 1.1)
    pairs = zip(rows["hedge"][:4], rows["queue"][:4], limits, strict=True)
    met = [own <= limit * other for own, other, limit in pairs]
    for name, is_met in zip(counts, (*met, all(met)), strict=True):
        counts[name] += is_met
print(f"hedge at most 1.15 (p99 and p99.9: 1.1) times queue, of {len(cells)} cells:", counts)
