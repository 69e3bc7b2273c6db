"""`python -m benchmarks engine`: a worker's tasks, by PyTorch and by ONNX Runtime.

Both run in turn, round after round, so that what else the machine does hits them alike. A ratio is
that of two medians; its spread is the smallest and largest ratio of one round.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame

from codedinvnet.bench import tables
from codedinvnet.files import check_writable
from codedinvnet.models.bundle import load_bundle, weights_digest
from codedinvnet.models.runtime import ONNX_RUNTIME, PYTORCH, check_installed
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.rows import SCHEMA_VERSION, append_row, read_rows
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers.computing import BundleSpec
from codedinvnet.serving.workers.result import OUTPUT

ROUNDS, QUICK_ROUNDS = 15, 3
SECONDS, QUICK_SECONDS = 0.5, 0.1
"""How long an engine runs in a round, at least: it computes as often as that takes."""
SLOW, FAST = "PyTorch", "ONNX Runtime"


def in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Time calls in turn, every other round backwards; return the ms of one call of each round."""

    def milliseconds(name: str, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            calls[name]()
        return 1000 * (time.perf_counter() - began) / count

    names, counts = list(calls), dict.fromkeys(calls, 1)
    for name in names:
        first = milliseconds(name, 1)  # loads and allocates
        once = first if first > 1000 * seconds else milliseconds(name, 1)
        counts[name] = max(1, math.ceil(1000 * seconds / once))
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(milliseconds(name, counts[name]))
    return times


def compared(what: str, times: Mapping[str, Sequence[float]], error: float) -> dict[str, Any]:
    """Return what a row says of the two engines.

    Args:
        what: was computed.
        times: of each engine, in ms, one of each round.
        error: the largest difference between what they computed.
    """
    ms = {name: round(statistics.median(values), 4) for name, values in times.items()}
    ratios = [slow / fast for slow, fast in zip(times[SLOW], times[FAST], strict=True)]
    faster = {
        "times": round(ms[SLOW] / ms[FAST], 3),
        "rounds": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    errors = {SLOW: 0.0, FAST: error}
    return {"what": what, "ms": ms, "errors": errors, "fast": FAST, "faster": {SLOW: faster}}


def measured(name: str, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of a bundle: of a query's task, and of a full group's parity, of noise."""
    k, shape = load_bundle(name).info.group_sizes[-1], load_bundle(name).info.input.shape
    computers = {
        arm: BundleSpec(name, k, threads=1, engine=kind).load()
        for arm, kind in ((SLOW, PYTORCH), (FAST, ONNX_RUNTIME))
    }
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(256, (k, *shape), generator=generator, dtype=torch.uint8).numpy()
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, SECONDS)
    for what, number, images in (("a query", 0, group[:1]), (f"the parity of {k}", k, group)):
        calls = {
            arm: partial(one.compute, number, {IMAGES: images}) for arm, one in computers.items()
        }
        slow, fast = (calls[arm]()[0][OUTPUT] for arm in (SLOW, FAST))
        yield compared(what, in_turn(calls, rounds, seconds), float(np.abs(slow - fast).max()))


def run(bundles: Sequence[str], *, quick: bool = False, out: Path | None) -> dict[str, Any]:
    """Measure bundles, and return a report; its rows are added to a file if one is named.

    Raises:
        UserError: before anything is measured, if a bundle cannot be loaded, ONNX Runtime is not
            installed, or the file cannot be written.
    """
    torch.set_num_threads(1)  # as a worker has
    check_installed(ONNX_RUNTIME)
    if out is not None:
        check_writable(out)
        read_rows(out)
    digests = {name: weights_digest(name) for name in bundles}
    rows = []
    for name, digest in digests.items():
        for found in measured(name, quick=quick):
            row = {
                "schema_version": SCHEMA_VERSION,
                "benchmark": "speed",
                "part": "engine",
                "bundle": name,
                "weights": digest,
                "quick": quick,
                "machine": describe_machine(),
                "cores": os.cpu_count(),
                "commit": describe_commit(),
                "began": time.strftime("%Y-%m-%dT%H:%M:%S"),
                **found,
            }
            rows.append(row)
            if out is not None:
                append_row(out, row)
    return {"rows": rows, "table": table(rows)}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the Markdown table: a line an engine, of rows of one kind the last one."""
    newest = {(row["bundle"], row["what"]): row for row in rows}
    lines = []
    for (bundle, what), row in newest.items():
        for arm, ms in row["ms"].items():
            found = row["faster"].get(arm, {})
            spread = "{:.2f} to {:.2f}".format(*found["rounds"]) if found else None
            lines.append(
                {
                    **{"bundle": bundle, "what": what, "arm": arm, "ms": ms},
                    "largest error": row["errors"].get(arm),
                    "times faster": found.get("times"),
                    "over the rounds": spread,
                }
            )
    formats = {"ms": ".3f", "largest error": ".1e", "times faster": ".2f"}
    return tables.markdown(DataFrame(lines), formats)
