from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ablation
from codedinvnet import stages
from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.config import parse_settings
from codedinvnet.data import load_images
from codedinvnet.errors import UserError
from codedinvnet.models.coded import build_encoder, build_network
from codedinvnet.rows import newest, read_rows
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
    path, trained, out = grid_file(tmp_path), [], tmp_path / "out.jsonl"
    real_train, real_fuse = stages.train, stages.fuse

    def train(run: stages.Run) -> dict[str, Any]:
        trained.append(run.network_folder)
        return real_train(run)

    def fuse(run: stages.Run, members: int) -> dict[str, Any]:
        if run.settings.fusion.model_dump()["joint_epochs"] == 0:
            raise KeyboardInterrupt if run.settings.seed == 2 else RuntimeError("out of memory")
        return real_fuse(run, members)

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(stages, "fuse", fuse)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path, data_dir)
    first = read_rows(out)
    assert [(row["row"], row["seed"], row["error"]) for row in first] == [
        ("all", 1, None),
        ("no joint training", 1, "RuntimeError: out of memory"),
        ("all", 2, None),
    ]
    assert "failed: RuntimeError: out of memory" in ablation.table(first, ablation.load_grid(path))
    monkeypatch.setattr(stages, "fuse", real_fuse)
    rows = run(path, tmp_path, data_dir)
    assert [rows[0], rows[2]] == [first[0], first[2]]  # not done again
    assert [row["error"] for row in rows] == [None] * 4
    assert len(trained) == 2 == len(set(trained))  # one network a seed, shared by the rows
    for row in rows:
        assert row["k"] == [2, 4]
        assert 0.2 < row["test"]["2"]["normal_accuracy"] <= 1  # chance is 0.1
        assert row["test"]["2"] != row["test"]["4"]
        assert row["test"] != row["validation"]
        assert row["test"]["seconds"] > 0
    text = ablation.table(rows, ablation.load_grid(path))
    assert "(test split)" in text
    assert text.count("| no joint training |") == 2  # at both sizes
    # A longer training is another trial; what is not changed is kept.
    longer = {"name": "longer", "change": {"fusion": {"epochs": 2}}}
    grid_file(tmp_path, rows=[{"name": "all", "change": {}}, longer], seeds=[1])
    again = run(path, tmp_path, data_dir, no_test=True)
    assert again[0] == rows[0]
    assert "test" not in again[1]
    assert len(trained) == 2


def test_keys_tell_trials_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = {"name": "pixels", "change": {"fusion": tiny_settings("pixels")["fusion"]}}
    path = grid_file(tmp_path, rows=[{"name": "all", "change": {}}, pixels], seeds=[1], k=[4])

    def names(quick: bool = False) -> list[tuple[str, str]]:
        found = ablation.trials(ablation.load_grid(path), path, quick)
        return [(trial.key, trial.network_name) for trial in found]

    first, short = names(), names(quick=True)
    assert {*first[0], *first[1]}.isdisjoint({*short[0], *short[1]})
    monkeypatch.setitem(ablation.TRAINING, "recovery", 2)
    changed = names()
    assert changed[1] == first[1]
    assert changed[0][0] != first[0][0]
    assert changed[0][1] == first[0][1]
    monkeypatch.setitem(ablation.TRAINING, "network", 2)
    for old, new in zip(first, names(), strict=True):
        assert {*old}.isdisjoint(new)


def test_the_committed_rows_are_those_of_the_shipped_grid() -> None:
    grid = ablation.load_grid(SHIPPED)
    rows = newest(read_rows(SHIPPED.parents[2] / "docs" / "results" / "ablation.jsonl"))
    wanted = {trial.key: trial for trial in ablation.trials(grid, SHIPPED)}
    for key in wanted.keys() & rows.keys():
        assert (rows[key]["row"], rows[key]["seed"]) == (
            wanted[key].row,
            wanted[key].settings.seed,
        )
    assert wanted.keys() & rows.keys()


def scored(name: str, recovered: float, seed: int = 1) -> dict[str, Any]:
    scores = {"normal_accuracy": 0.98, "recovered_accuracy": recovered}
    row = {"row": name, "data": "mnist", "seed": seed, "k": [10], "error": None}
    return {**row, "validation": {"seconds": 60.0, "10": scores}}


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
    assert len({trial.key for trial in found}) == 3


def test_a_section_of_another_objective_replaces_the_base() -> None:
    base = {"fusion": {"objective": "recovery", "epochs": 2}, "network": {"hidden": [1], "k": 1}}
    changed = ablation.merge(base, {"fusion": {"objective": "pixels"}, "network": {"k": 2}})
    assert changed == {"fusion": {"objective": "pixels"}, "network": {"hidden": [1], "k": 2}}
    assert base["fusion"] == {"objective": "recovery", "epochs": 2}


PARTS = {
    "fusion.objective": "objective",
    "fusion.decoded_weight": "objective",
    "fusion.distilled_share": "objective",
    "fusion.latent_weight": "objective",
    "fusion.evidence_weight": "loss of the evidence",
    "fusion.epochs": "joint training",
    "fusion.joint_epochs": "joint training",
    "fusion.head_hidden": "recovery head",
    "fusion.encoder.side_features": "side features",
    "fusion.encoder.kind": "E",
    "fusion.encoder.width": "E",
    "fusion.encoder.depth": "E",
    "fusion.encoder.cell_width": "E",
    "training.mixup": "training of f",
    "training.precision": "training of f",
    "network.head_hidden": "g",
    "network.kind": "f",
    "network.hidden": "f",
    "network.coefficient": "f",
}
"""What a setting belongs to, of which a row changes one."""
PIXELS = "objective: pixels (the paper), f and g frozen, no recovery head or side features"


def leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        inner = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def changed_parts(one: ablation.Trial, other: ablation.Trial) -> set[str]:
    """Name what differs in two trials; settings of the fusion that one objective alone has, or that
    mean something else to the other, are of the objective."""
    of_both = {"fusion.head_hidden": 0, "fusion.joint_epochs": 0}  # as the paper's objective has it
    a, b = ({**of_both, **leaves(trial.settings.model_dump())} for trial in (one, other))
    differ = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
    if "fusion.objective" not in differ:
        return {PARTS[key] for key in differ}
    kept = {key for key in differ if key in of_both or not key.startswith("fusion.")}
    kept |= {key for key in differ if key.startswith("fusion.encoder.")}
    return {PARTS[key] for key in kept} | {"objective"}


def images_seen(trial: ablation.Trial) -> tuple[int, int]:
    """Return how many images f and g train on, and then E and what trains with it, the paper's
    discriminator not counted."""
    settings, fusion = trial.settings, trial.settings.fusion
    images = settings.training.epochs * (60_000 - settings.data.validation)
    if fusion.objective == "pixels":
        batches = fusion.groups // fusion.batch_size
        steps = fusion.epochs * (batches // fusion.discriminator_steps)
        return images, steps * fusion.batch_size * fusion.members
    frozen, joint = fusion.epochs * fusion.batch_size, fusion.joint_epochs * fusion.joint_batch_size
    return images, fusion.steps_per_epoch * (frozen + joint) * fusion.members


def first_trials() -> dict[str, ablation.Trial]:
    """Return the shipped grid's trials of the first image set and seed, by row."""
    grid = ablation.load_grid(SHIPPED)
    return {t.row: t for t in ablation.trials(grid, SHIPPED)[: len(grid.rows)]}


def test_the_shipped_grid_changes_one_thing_at_a_time() -> None:
    grid, found = ablation.load_grid(SHIPPED), first_trials()
    assert len(ablation.trials(grid, SHIPPED)) == len(grid.data) * len(grid.seeds) * len(grid.rows)
    assert len(grid.seeds) >= 3
    assert grid.rows[0].change == {}
    first, *others = found.values()
    against = {row.name: row.against or grid.rows[0].name for row in grid.rows}
    changed = {trial.row: changed_parts(trial, found[against[trial.row]]) for trial in others}
    assert changed.pop(PIXELS) == {"objective", "joint training", "recovery head", "side features"}
    assert {row for row, parts in changed.items() if len(parts) != 1} == set()
    seen = {trial.row: images_seen(trial) for trial in found.values()}
    assert seen.pop(PIXELS) == (165_000, 78 * 240)
    assert set(seen.values()) == {(165_000, 96_000)}
    again = parse_settings(first.settings.model_dump(mode="json"), "here")
    assert again == first.settings


def costs(trial: ablation.Trial) -> tuple[int, int]:
    """Return the multiply-adds of f for an image and of E for a group of ten."""
    settings, shape = trial.settings, (1, 32, 32)
    network = build_network(settings.network, shape).eval()
    encoder = build_encoder(settings.fusion.encoder, shape).eval()
    group = torch.zeros(1, 10, *shape)
    return count_macs(lambda: network(group[0, :1])), count_macs(lambda: encoder(group))


def test_the_shipped_grid_compares_at_nearly_equal_cost() -> None:
    found = first_trials()
    mosaic, own = "E a mosaic, whose latent is no mean", "a mosaic with stages of the cells' own"
    (design, lean), (irevnet, same), (_, shared), (_, apart) = (
        costs(found[row]) for row in (next(iter(found)), "f: i-RevNet", mosaic, own)
    )
    assert irevnet / design == pytest.approx(1, abs=0.03)
    assert same == lean
    assert shared / lean == pytest.approx(0.81, abs=0.01)  # what their notes say
    assert apart / shared == pytest.approx(1.07, abs=0.01)


def test_the_quick_version_takes_few_images_and_steps(data_dir: Path, tmp_path: Path) -> None:
    pixels = {"name": "pixels", "change": {"fusion": tiny_settings("pixels")["fusion"]}}
    data = {name: MNIST for name in ("mnist", "again")}
    path = grid_file(tmp_path, rows=[{"name": "all", "change": {}}, pixels], data=data, k=[4])
    rows = run(path, tmp_path, data_dir, quick=True)
    assert [(row["row"], row["data"], row["seed"], row["error"]) for row in rows] == [
        ("all", "mnist", 1, None),
        ("pixels", "mnist", 1, None),
    ]
    with np.load(tmp_path / "runs" / "images" / "mnist" / "train.npz") as written:
        assert written["images"].shape == (800, 28, 28, 1)  # all that there are
    found = load_images("mnist", "test", data_dir=tmp_path / "runs" / "images")
    same = load_images("mnist", "test", data_dir=data_dir)
    everything = torch.arange(len(same))
    for one, other in zip(found.batch(everything), same.batch(everything), strict=True):
        assert torch.equal(one, other)


def test_the_shipped_grid_in_quick_trains_for_seconds() -> None:
    grid = ablation.load_grid(SHIPPED)
    found = ablation.trials(grid, SHIPPED, quick=True)
    assert len(found) == len(grid.rows)
    for trial in found:
        fusion = trial.settings.fusion
        assert trial.settings.data.validation <= 1000
        assert fusion.epochs <= 2
        if fusion.objective == "pixels":
            assert fusion.batch_size * fusion.discriminator_steps <= fusion.groups <= 480
        else:
            assert fusion.joint_epochs <= 2
            assert fusion.steps_per_epoch <= 10
    assert {trial.key for trial in found}.isdisjoint(t.key for t in ablation.trials(grid, SHIPPED))


def test_runs_that_cannot_be_kept_are_not_begun(data_dir: Path, tmp_path: Path) -> None:
    folder = grid_file(tmp_path)  # a file
    with pytest.raises(UserError, match=r"--save-dir: cannot write into .*: .* is no folder"):
        ablation.run(folder, tmp_path / "out.jsonl", save_dir=folder, data_dir=data_dir)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("quick", [False, True])
def test_without_images_no_trial_is_begun(tmp_path: Path, quick: bool) -> None:
    with pytest.raises(UserError, match="holds no train images"):
        run(grid_file(tmp_path), tmp_path, tmp_path, quick=quick)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]
