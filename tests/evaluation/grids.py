"""Grids of `bench accuracy` that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from codedinvnet.evaluation import methods

PAPER = {
    "objective": "pixels",
    "groups": 40,
    "epochs": 1,
    "batch_size": 4,
    "discriminator_steps": 2,
    "discriminator_filters": 4,
    "discriminator_layers": 2,
    "encoder": {"kind": "lean", "width": 4},
}
PART = {"epochs": 1, "steps_per_epoch": 3, "batch_size": 16}
BLOCKS: list[dict[str, Any]] = [
    {"methods": ["none", "replication", "approxifer", "nercc"], "bases": ["invertible", "resnet"]},
    {"methods": ["coded-invnet", "oracle", "small-backup", "parm"]},
    {"methods": ["coded-invnet-paper", "average-image"]},
    {"methods": ["coded-invnet", "small-backup"], "missing": [2]},
]
TRIALS = 16


def write_grid(path: Path, bundle: Path, blocks: list[dict[str, Any]] | None = None) -> Path:
    grid = {
        "name": "tiny",
        "datasets": {
            "mnist": {
                "bundle": str(bundle),
                "classifier": PART,
                "backup": PART,
                "parity": PART,
                "paper": PAPER,
            }
        },
        "groupings": 2,
        "patterns": 30,
        "blocks": [{"k": [4], **block} for block in (BLOCKS if blocks is None else blocks)],
    }
    path.write_text(json.dumps(grid))
    return path


def run(grid: Path, folder: Path, data_dir: Path, **more: Any) -> dict[str, Any]:
    return methods.run(
        grid,
        out=folder / "rows.jsonl",
        save_dir=folder / "runs",
        data_dir=data_dir,
        device=torch.device("cpu"),
        **more,
    )
