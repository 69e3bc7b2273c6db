from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from codedinvnet.codes.build import scheme_for
from codedinvnet.data import ImageSet, sample_images
from codedinvnet.demo import draw_group, run_demo, table
from codedinvnet.evaluation.accuracy import evaluate
from codedinvnet.models import bundle as bundle_module
from codedinvnet.models.bundle import Bundle

PNG = b"\x89PNG\r\n\x1a\n"


def size_of_png(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(PNG)
    assert content.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize("k", [2, 3, 4])
def test_group_is_drawn(k: int, bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "group.png"
    draw_group(bundle, sample_images("mnist"), path, k=k, seed=0)
    width, height = size_of_png(path)
    assert width > 800
    assert height > 400
    assert path.stat().st_size > 15_000  # a blank figure of that size has 3 kB


def test_table(bundle: Bundle, held_out: ImageSet) -> None:
    rows = [
        ("mnist", evaluate(scheme_for(bundle, k), held_out, k=k, progress=False)) for k in (2, 4)
    ]
    title, head, *lines = table(rows).splitlines()
    assert "Every worker erased in turn" in title
    assert head.split()[:3] == ["bundle", "k", "overhead"]
    assert len(lines) == 2
    for line, (_, found), overhead in zip(lines, rows, ("50%", "25%"), strict=True):
        words = line.split()
        assert words[:3] == ["mnist", str(found.k), overhead]
        shares = (found.normal_accuracy, found.recovered_accuracy, found.worst_position_accuracy)
        assert words[3:] == [f"{100 * share:.1f}" for share in (*shares, found.agreement)]


def test_demo_runs_on_shipped_bundles(
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(bundle_folder, tmp_path / "bundles" / "mnist")
    folder = tmp_path / "pictures" / "deep"
    monkeypatch.setattr("codedinvnet.demo.GROUP_SIZES", (2, 4))
    real = draw_group

    def draw_four(bundle: Bundle, source: ImageSet, path: Path, *, k: int, seed: int) -> None:
        assert k == 10
        real(bundle, source, path, k=4, seed=seed)

    monkeypatch.setattr("codedinvnet.demo.draw_group", draw_four)
    monkeypatch.setattr("codedinvnet.demo.load_bundle", lambda name: shipped(tmp_path, name))
    run_demo(["mnist"], folder, seed=0)
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.startswith("mnist")]) == 2
    assert f"picture: {folder / 'mnist.png'}" in printed
    size_of_png(folder / "mnist.png")


def shipped(root: Path, name: str) -> Bundle:
    return bundle_module.load_bundle(root / "bundles" / name)
