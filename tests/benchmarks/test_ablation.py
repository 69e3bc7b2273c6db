from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablation
from codedinvnet import stages
from codedinvnet.errors import UserError
from codedinvnet.evaluation.grid import Cell, read_rows
from tests.conftest import tiny_settings

MNIST = {"data": {"name": "mnist", "validation": 100, "padding": 2}}
SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "bench" / "ablation.json"


def grid_file(folder: Path, **changes: Any) -> Path:
    base = {k: v for k, v in tiny_settings().items() if k not in ("name", "seed", "data")}
    base["fusion"] |= {"epochs": 1, "steps_per_epoch": 2}
    raw = {
        "k": [2, 4],
        "base": base,
        "data": {"mnist": MNIST},
        "seeds": [1, 2],
        "rows": [
            {"name": "all", "change": {}},
            {"name": "no joint training", "change": {"fusion": {"joint_epochs": 0}}},
        ],
        **changes,
    }
    path = folder / "grid.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def run(path: Path, folder: Path, data_dir: Path, **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ablation.run(
        path, folder / "out.jsonl", save_dir=folder / "runs", data_dir=data_dir, **options
    )["rows"]
    return rows


def test_an_interrupted_grid_goes_on_where_it_stopped(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a trial that fails is a row, and is tried again."""
    path, trained, out = grid_file(tmp_path, seeds=[1]), [], tmp_path / "out.jsonl"
    real_train, real_fuse = stages.train, stages.fuse
    harm: list[BaseException] = [KeyboardInterrupt(), RuntimeError("out of memory")]

    def train(run: stages.Run) -> dict[str, Any]:
        trained.append(run.network_folder)
        return real_train(run)

    def fuse(run: stages.Run, members: int) -> dict[str, Any]:
        if harm and run.settings.fusion.model_dump()["joint_epochs"] == 0:
            raise harm.pop()
        return real_fuse(run, members)

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(stages, "fuse", fuse)
    first = run(path, tmp_path, data_dir)
    assert [row["error"] for row in first] == [None, "RuntimeError: out of memory"]
    assert "failed: RuntimeError: out of memory" in ablation.table(first, ablation.load_grid(path))
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path, data_dir)
    assert read_rows(out) == first
    rows = run(path, tmp_path, data_dir)
    assert rows[0] == first[0]  # not done again
    rows = [row for row in rows if row["error"] is None]
    assert len(rows) == 2
    assert len(trained) == 1  # one network of the seed, shared by the rows
    for row in rows:
        assert row["sizes"] == "2, 4"
        assert 0.2 < row["test"]["2"]["normal_accuracy"] <= 1  # chance is 0.1
        assert row["test"]["2"] != row["test"]["4"]
        assert row["test"] != row["validation"]
        assert row["test"]["seconds"] > 0
    text = ablation.table(rows, ablation.load_grid(path))
    assert "(test split)" in text
    assert text.count("| no joint training |") == 2  # at both sizes
    # Another training is another trial; what is not changed is kept.
    shorter = {"name": "shorter", "change": {"fusion": {"epochs": 0}}}
    grid_file(tmp_path, rows=[{"name": "all", "change": {}}, shorter], seeds=[1], k=[2, 4])
    again = run(path, tmp_path, data_dir)
    assert again[0] == rows[0]
    assert again[-1]["row"] == "shorter"


def test_the_committed_rows_are_those_of_the_shipped_grid() -> None:
    grid = ablation.load_grid(SHIPPED)
    rows = read_rows(SHIPPED.parents[2] / "docs" / "results" / "ablation.jsonl", "ablation")
    wanted = {
        Cell("ablation", trial.place, trial.depends, dict).key
        for trial in ablation.trials(grid, SHIPPED)
    }
    assert {row["key"] for row in rows} <= wanted


def scored(name: str, recovered: float, seed: int = 1) -> dict[str, Any]:
    scores = {"normal_accuracy": 0.98, "recovered_accuracy": recovered}
    place = {"row": name, "data": "mnist", "seed": seed, "sizes": "10"}
    measured = {"validation": {"seconds": 60.0, "10": scores}}
    return Cell("ablation", place, {}, lambda: measured).row()


def test_margins_are_to_the_row_that_is_named_seed_by_seed(tmp_path: Path) -> None:
    names = ({"name": "all"}, {"name": "no g'"}, {"name": "no E", "against": "no g'", "note": "!"})
    grid = ablation.load_grid(grid_file(tmp_path, rows=[{**row, "change": {}} for row in names]))
    rows = [scored("all", share, seed) for seed, share in enumerate((0.95, 0.97, 0.96), start=1)]
    rows += [scored("no g'", share, seed) for seed, share in enumerate((0.91, 0.92, 0.91), start=1)]
    rows += [scored("no E", 0.5), scored("no E", 0.5, 4)]
    lines = [line.split(" | ") for line in ablation.table(rows, grid).splitlines()[2:]]
    assert [line[3] for line in lines] == ["all", "no g'", "no E (!)"]
    assert lines[0][5].startswith("96.00 ± 2.48")  # t(0.975, 2) / sqrt(3), s = 1
    assert lines[1][6].startswith("-4.67 ± ")
    assert lines[1][7] == "1"
    assert lines[2][6:8] == ["-41.00", "2"]  # there is no other of seed 4, so no interval
    rows[0] |= {"error": "RuntimeError: a | b\nand more"}
    text = ablation.table(rows, grid)
    assert "failed: RuntimeError: a \\| b and more" in text
    assert "-4.67" not in text  # there is no margin to a row that failed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": "1"}, "seeds: "),
        ({"seeds": []}, "seeds: "),
        ({"data": {}}, "data: "),
        ({"data": {"mnist": {}}}, "row 'all': missing key 'data'"),
        ({"rows": []}, "rows: "),
        (
            {"rows": [{"name": "all", "change": {}}, {"name": "all", "change": {"seed": 2}}]},
            "rows: two rows have the name 'all'",
        ),
        (
            {
                "rows": [
                    {"name": "all", "against": "none", "change": {}},
                    {"name": "none", "change": {}},
                ]
            },
            "rows: 'all' is against 'none', no earlier row's name",
        ),
        ({"base": {"training": {"epochs": 1}}}, "row 'all': missing key 'fusion'"),
        ({"base": {"training": {"epochs": 1}, "fusion": 3}}, "row 'all': fusion: "),
        ({"row": []}, "unknown key 'row': did you mean 'rows'"),
        (
            {"rows": [{"name": "wider", "change": {"fusion": {"encoder": {"wide": 3}}}}]},
            "row 'wider': unknown key 'fusion.encoder.wide'",
        ),
    ],
)
def test_a_wrong_grid_is_refused_before_any_work(
    changes: dict[str, Any], message: str, data_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(grid_file(tmp_path, **changes), tmp_path, data_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]


def test_the_papers_objective_has_an_encoder_for_each_size(tmp_path: Path) -> None:
    pixels = {"name": "pixels", "change": {"fusion": tiny_settings("pixels")["fusion"]}}
    path = grid_file(tmp_path, rows=[{"name": "all", "change": {}}, pixels], seeds=[1])
    found = ablation.trials(ablation.load_grid(path), path)
    assert [(trial.row, trial.sizes) for trial in found] == [
        ("all", (2, 4)),
        ("pixels", (2,)),
        ("pixels", (4,)),
    ]
    assert len({str(trial.place) for trial in found}) == 3


def test_a_section_of_another_objective_replaces_the_base() -> None:
    base = {"fusion": {"objective": "recovery", "epochs": 2}, "network": {"hidden": [1], "k": 1}}
    changed = ablation.merge(base, {"fusion": {"objective": "pixels"}, "network": {"k": 2}})
    assert changed == {"fusion": {"objective": "pixels"}, "network": {"hidden": [1], "k": 2}}
    assert base["fusion"] == {"objective": "recovery", "epochs": 2}


def test_without_images_no_trial_is_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no train images"):
        run(grid_file(tmp_path), tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]
