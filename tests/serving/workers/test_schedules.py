"""Files of faults: what they may say, and how a wrong one is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError
from codedinvnet.serving.app import open_app
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.workers.faults import load_schedule

# Files


def write(folder: Path, text: str) -> Path:
    path = folder / "faults.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_in_the_docs_is_a_schedule(tmp_path: Path) -> None:
    docs = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "inject-faults.md"
    blocks = re.findall(r"```json\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in blocks if '"faults"' in block]
    made = load_schedule(write(tmp_path, text))
    assert made.seed == 1
    assert [fault.kind for fault in made.faults] == ["slow", "hold", "crash", "hang", "corrupt"]
    slow, hold, crash, hang, corrupt = made.faults
    assert slow.delay == Distribution(distribution="pareto", ms=20, shape=1.5)
    assert (hold.worker, hold.probability, hold.per_request) == (None, 0.1, True)
    assert (crash.from_s, crash.until_s) == (10, 10.5)
    assert hang.worker == 6
    assert corrupt.scale == 2


@pytest.mark.parametrize("method", ["nercc", "approxifer"])
def test_faults_of_data_tasks_need_a_method_that_has_some(method: str, tmp_path: Path) -> None:
    hold = {"kind": "hold", "per_request": True, "delay": {"ms": 100}}
    faults = write(tmp_path, json.dumps({"faults": [hold]}))
    with pytest.raises(UserError, match="per_request"):
        open_app(ServeOptions(source="mnist", k=4, method=method, faults=faults))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "must be one JSON object"),
        ({"sede": 3}, "unknown key 'sede': did you mean 'seed'?"),
        ({"faults": [{}]}, "missing key 'faults.0.kind'"),
        ({"faults": [{"kind": "lazy"}]}, "faults.0.kind: input should be 'slow', 'hold', 'hang'"),
        ({"faults": [{"kind": "slow"}]}, "faults.0: a fault of kind 'slow' needs delay"),
        ({"faults": [{"kind": "hang", "spread": True}]}, "a fault of kind 'hang' has no spread"),
        (
            {"faults": [{"kind": "hang", "delay": {"ms": 500}}]},
            "faults.0: a fault of kind 'hang' has no delay",
        ),
        ({"faults": [{"kind": "crash", "scale": 2}]}, "has no scale"),
        ({"faults": [{"kind": "crash", "each_image": True}]}, "has no each_image"),
        (
            {"faults": [{"kind": "hang", "from_s": 2, "until_s": 2}]},
            "faults.0: until_s 2 is not after from_s 2",
        ),
        (
            {"faults": [{"kind": "hang", "from_task": 10, "until_task": 10}]},
            "faults.0: until_task 10 is not above from_task 10",
        ),
        ({"faults": [{"kind": "hang", "wroker": 3}]}, "unknown key 'faults.0.wroker': did you"),
        ({"faults": [{"kind": "hang", "probability": 0}]}, "faults.0.probability: "),
        ({"faults": [{"kind": "slow", "delay": {"ms": -1}}]}, "faults.0.delay.ms: "),
        (
            {"faults": [{"kind": "factor", "factor": 2}]},
            "faults.0: faults of kind 'factor' are only simulated",
        ),
        (
            {"faults": [{"kind": "slow", "delay": {"ms": 1, "distribution": "normal"}}]},
            "faults.0.delay.distribution: ",
        ),
    ],
)
def test_a_wrong_schedule_is_one_line_that_names_the_key(
    tmp_path: Path, raw: Any, message: str
) -> None:
    path = write(tmp_path, json.dumps(raw))
    with pytest.raises(UserError) as caught:
        load_schedule(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
