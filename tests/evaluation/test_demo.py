from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from codedinvnet.codes.build import scheme_for
from codedinvnet.data import sample_images
from codedinvnet.evaluation import demo
from codedinvnet.evaluation.accuracy import evaluate
from codedinvnet.models.bundle import load_bundle


def test_the_table_has_what_an_evaluation_finds_and_the_picture_is_there(
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = load_bundle(bundle_folder)
    monkeypatch.setattr(demo, "SIZES", (2, 4))
    monkeypatch.setattr(demo, "load_bundle", lambda name: bundle)
    picture = tmp_path / "demo.png"
    demo.run_demo(["mnist"], picture)
    title, head, *lines, told = capsys.readouterr().out.splitlines()
    assert str(picture) in told
    height, width, _ = imread(picture).shape
    assert width > height > 100
    assert "Every worker erased in turn" in title
    assert head.split()[:3] == ["bundle", "k", "overhead"]
    for line, k, overhead in zip(lines, (2, 4), ("50%", "25%"), strict=True):
        found = evaluate(scheme_for(bundle, k), sample_images("mnist"), k=k, progress=False)
        shares = (found.normal_accuracy, found.recovered_accuracy, found.worst_position_accuracy)
        shown = [f"{100 * share:.1f}" for share in (*shares, found.agreement)]
        assert line.split() == ["mnist", str(k), overhead, *shown]
