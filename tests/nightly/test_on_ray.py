"""A protected model whose workers are Ray's actors, one of which is late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codedinvnet.models import open_model
from codedinvnet.protect import load_protection
from codedinvnet.serving.options import ServeOptions
from codedinvnet.serving.workers.faults import Fault
from tests.e2e.test_ray import cluster as cluster
from tests.protect.conftest import PLACE
from tests.protect.factories import FEATURES
from tests.protect.test_served import LATE, answers


def test_actors_make_up_for_a_late_one(
    cluster: Any,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the small backup and by the code, whose encoder runs in an actor."""
    source = f"{PLACE}:vectors"
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}/src:{Path.cwd()}")
    x = np.random.default_rng(3).random((4, FEATURES), np.float32)
    model = open_model(source)
    for method in ("small-backup", "code"):
        options = ServeOptions(
            source,
            protection=finished,
            method=method,
            pool="ray",
            ray_address=cluster.address,
            demo=True,
            deadline_ms=60_000,
        )
        found = answers(options, {"x": x}, Fault(kind="hang", worker=LATE))
        assert found["outcome"].tolist() == [b"direct", b"decoded", b"direct", b"direct"]
        for i in (0, 2, 3):
            own = model.run({"x": x[i : i + 1]})["output"]
            assert found["output"][i].tobytes() == own.tobytes()
        scheme = load_protection(finished, model, method)
        outputs = {
            number: scheme.compute(number, torch.from_numpy(x[list(task.members)])[None]).output
            for number, task in scheme.rules.tasks(4).items()
            if number != LATE
        }
        assert found["output"][1] == pytest.approx(
            scheme.decode(outputs, 4)[1][0].numpy(), abs=1e-4
        )
