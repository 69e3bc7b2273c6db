"""`python -m benchmarks frontier`: networks that are trained alike, and their table and picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import frontier
from codedinvnet.common.grid import append_row
from codedinvnet.models.bundle import bundle_info
from tests.conftest import Command, tiny_settings
from tests.evaluation.canned import cells, made


def test_each_point_is_trained_once_and_scored_on_validation_images(
    tmp_path: Path, data_dir: Path, call_benchmarks: Command
) -> None:
    base = tiny_settings("recovery")
    points = {"bounded": {"network": {"coefficient": 0.5}}, "plain": {"network": {"kind": "plain"}}}
    path, out = tmp_path / "frontier.json", tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"base": base, "points": points}))
    asked = ["frontier", str(path), "--data-dir", str(data_dir), "--save-dir", str(tmp_path)]
    asked += ["--out", str(out)]
    assert call_benchmarks(*asked, "--only", "f=plain").code == 0
    outcome = call_benchmarks(*asked)
    assert outcome.code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["f"] for row in rows] == ["plain", "bounded"]
    assert [row["settings"]["network"]["kind"] for row in rows] == ["plain", "iresnet"]
    bundles = [bundle_info(path.parent) for path in tmp_path.rglob("bundle.json")]
    trained = {info.model.network.kind: info.figures["validation"] for info in bundles}
    for row in rows:
        wanted = trained[row["settings"]["network"]["kind"]]
        assert row["normal"] == pytest.approx(wanted["validation_normal"], abs=1e-6)
        assert row["recovered"] == pytest.approx(wanted["validation_recovered_k4"], abs=1e-6)
    shown = {line["f"]: line for line in cells(outcome.out.strip())}
    assert float(shown["plain"]["recovered"]) == pytest.approx(100 * rows[0]["recovered"], abs=0.01)


def test_the_picture_and_the_table_have_every_point(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    for name, normal, recovered in (("i-ResNet, 0.9", 0.9, 0.89), ("plain ResNet", 0.93, 0.85)):
        figures = {"alone": normal, "normal": normal, "recovered": recovered, "macs": 15e6}
        place = {"dataset": "fashion", "f": name}
        append_row(rows, made(frontier.KIND, place, {}, figures, None))
    lost = {line["f"]: line["lost to decoding"] for line in cells(frontier.page(rows))}
    assert lost == {"plain ResNet": "8.00", "i-ResNet, 0.9": "1.00"}
    frontier.draw(rows, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
