from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ablation
from codedinvnet import stages
from codedinvnet.checkpoint import load_checkpoint
from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.config import parse_settings
from codedinvnet.data import load_images
from codedinvnet.errors import UserError
from codedinvnet.models.coded import build_encoder, build_network
from codedinvnet.rows import append_row
from tests.bench import canned
from tests.conftest import tiny_settings

CPU = torch.device("cpu")
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
    return ablation.run(
        path,
        folder / "out.jsonl",
        save_dir=folder / "runs",
        data_dir=data_dir,
        device=CPU,
        **options,
    )


def test_an_interrupted_grid_goes_on_where_it_stopped(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trained = grid_file(tmp_path), []
    real_train, real_fuse = stages.train, stages.fuse

    def train(run: stages.Run) -> dict[str, Any]:
        trained.append(run.network_folder)
        return real_train(run)

    def stop(run: stages.Run, members: int) -> dict[str, Any]:
        if run.settings.fusion.model_dump()["joint_epochs"] == 0:
            raise KeyboardInterrupt
        return real_fuse(run, members)

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(stages, "fuse", stop)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path, data_dir)
    first = ablation.read_results(tmp_path / "out.jsonl")
    assert [(row["row"], row["seed"]) for row in first] == [("all", 1)]
    assert "test" not in first[0]  # the test split is read in the end, for all
    monkeypatch.setattr(stages, "fuse", real_fuse)
    rows = run(path, tmp_path, data_dir)
    assert rows == ablation.read_results(tmp_path / "out.jsonl")
    assert [(row["row"], row["seed"]) for row in rows] == [
        ("all", 1),
        ("no joint training", 1),
        ("all", 2),
        ("no joint training", 2),
    ]
    assert {key: rows[0][key] for key in first[0]} == first[0]  # not done again
    assert len(trained) == 2 == len(set(trained))  # one network a seed, shared by the rows
    for row in rows:
        assert row["k"] == [2, 4]
        assert 0.2 < row["test"]["2"]["normal_accuracy"] <= 1  # chance is 0.1
        assert row["test"]["2"] != row["test"]["4"]
        assert row["test"] != row["validation"]
    text = ablation.table(rows)
    assert "| mnist, test split, k = 2 |" in text
    assert "| mnist, test split, k = 4 |" in text
    assert text.count("±") == 2 * (2 * 2 + 1)  # normal and recovered of two rows, and one margin
    assert text.count(" | 1 | ") == 2  # the row that it is to


def test_a_changed_grid_trains_what_is_new_and_keeps_the_rest(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were inserted, edited or taken out: no trial meets another one's checkpoints."""
    fused: list[str] = []
    real = stages.fuse

    def fuse(run: stages.Run, members: int) -> dict[str, Any]:
        fused.append(run.settings.name)
        return real(run, members)

    monkeypatch.setattr(stages, "fuse", fuse)
    reference = {"name": "all", "change": {}}
    longer = {"name": "longer", "change": {"fusion": {"epochs": 2}}}
    longest = {"name": "longer", "change": {"fusion": {"epochs": 3}}}
    none = {"name": "no joint training", "change": {"fusion": {"joint_epochs": 0}}}
    path = grid_file(tmp_path, rows=[reference, none], seeds=[1])
    first = run(path, tmp_path, data_dir)
    grid_file(tmp_path, rows=[reference, longer, none], seeds=[1])  # one in the middle
    second = run(path, tmp_path, data_dir)
    assert [first[0], first[1]] == [second[0], second[2]]
    grid_file(tmp_path, rows=[reference, longest], seeds=[1])  # one edited, one taken out
    third = run(path, tmp_path, data_dir)
    assert third[0] == first[0]
    assert ablation.read_results(tmp_path / "out.jsonl") == third
    everything = ablation.read_everything(tmp_path / "out.jsonl")
    assert [row["row"] for row in everything] == ["all", "longer", "longer", "no joint training"]
    assert not any("error" in row for row in everything)
    assert len(fused) == 4 == len(set(fused))
    grid_file(tmp_path, rows=[reference, none], seeds=[1])  # and all is as it was
    assert run(path, tmp_path, data_dir) == first
    assert ablation.read_results(tmp_path / "out.jsonl") == first
    assert len(fused) == 4
    assert len(ablation.read_everything(tmp_path / "out.jsonl")) == 4


def as_written(row: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return a row as earlier releases left it, with these options in its key, and its folder."""
    key = json.dumps([row["row"], row["data"], row["k"], options])
    kept = {name: value for name, value in row.items() if name not in ("folder", "test")}
    return {**kept, "key": key}, f"mnist-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def test_results_of_earlier_releases_are_found_with_their_folders(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrote all options, of which there were fewer, the next left out those at defaults."""
    path, out = grid_file(tmp_path, seeds=[1]), tmp_path / "out.jsonl"
    rows = run(path, tmp_path, data_dir)
    fewer = json.loads(rows[0]["key"])[3]
    del fewer["fusion"]["encoder"]["cell_width"]
    settings = parse_settings({**json.loads(rows[1]["key"])[3], "name": "any"}, "here")
    short = settings.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    found = [as_written(row, spelt) for row, spelt in zip(rows, (fewer, short), strict=True)]
    for row, (_, folder) in zip(rows, found, strict=True):
        assert folder != row["folder"]
        (tmp_path / "runs" / row["folder"]).rename(tmp_path / "runs" / folder)
    failed = {name: value for name, value in rows[0].items() if name != "validation"}
    lines = [{**failed, "error": "RuntimeError: no"}, *(old for old, _ in found), rows[1]]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(stages, "train", None)
    monkeypatch.setattr(stages, "fuse", None)
    again = run(path, tmp_path, data_dir)
    assert [row["folder"] for row in again] == [folder for _, folder in found]
    for row, before in zip(again, rows, strict=True):
        assert row == {**before, "folder": row["folder"]}
    assert ablation.read_everything(out) == again  # a trial has one row


def test_a_key_tells_options_apart_and_keeps_what_is_no_option(tmp_path: Path) -> None:
    trial = ablation.trials(ablation.load_grid(grid_file(tmp_path)), tmp_path)[0]
    name, data, sizes, options = json.loads(trial.key)
    options["fusion"]["decoded_weight"] = 0.5  # were it the default of another release, left out
    other = json.dumps([name, data, sizes, options])
    assert ablation._respelt(other) == other != trial.key
    options["fusion"]["magic"] = 1
    gone = json.dumps([name, data, sizes, options])
    assert ablation._respelt(gone) == gone


def test_a_new_version_of_a_training_makes_its_results_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = {"name": "pixels", "change": {"fusion": tiny_settings("pixels")["fusion"]}}
    path = grid_file(tmp_path, rows=[{"name": "all", "change": {}}, pixels], seeds=[1], k=[4])

    def names() -> list[tuple[str, str, str]]:
        found = ablation.trials(ablation.load_grid(path), path)
        return [(trial.key, trial.folder, trial.network_name) for trial in found]

    first = names()
    recovery, one = first
    monkeypatch.setitem(ablation.TRAINING, "recovery", 2)
    changed, same = names()
    assert same == one
    assert changed[0] != recovery[0]
    assert changed[1] != recovery[1]
    assert changed[2] == recovery[2]
    assert ablation._respelt(changed[0]) == changed[0]
    assert ablation._respelt(recovery[0]) == recovery[0]
    monkeypatch.setitem(ablation.TRAINING, "network", 2)
    for before, after in zip(first, names(), strict=True):
        assert all(a != b for a, b in zip(after, before, strict=True))


def test_the_quick_version_shares_nothing_with_the_whole_one(tmp_path: Path) -> None:
    path = grid_file(tmp_path)
    grid = ablation.load_grid(path)
    quick, whole = ablation.trials(grid, path, quick=True)[0], ablation.trials(grid, path)[0]
    assert quick.settings == whole.settings  # short enough as they are
    assert quick.key != whole.key
    assert quick.folder != whole.folder
    assert quick.network_name != whole.network_name


def test_a_failed_trial_is_a_row_with_its_error_and_is_tried_again(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = grid_file(tmp_path, seeds=[1])
    real = stages.fuse

    def fail(run: stages.Run, members: int) -> dict[str, Any]:
        if run.settings.fusion.model_dump()["joint_epochs"] == 0:
            raise RuntimeError("out of memory")
        return real(run, members)

    monkeypatch.setattr(stages, "fuse", fail)
    rows = run(path, tmp_path, data_dir)
    assert ["error" in row for row in rows] == [False, True]
    assert rows[1]["error"] == "RuntimeError: out of memory"
    assert "failed: RuntimeError: out of memory" in ablation.table(rows)
    monkeypatch.setattr(stages, "fuse", real)
    assert not any("error" in row for row in run(path, tmp_path, data_dir, test=False))


def test_a_trial_whose_bundle_is_gone_is_trained_anew_for_the_test_split(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fused = grid_file(tmp_path, seeds=[1]), []
    before = run(path, tmp_path, data_dir, test=False)
    real = stages.fuse

    def fuse(run: stages.Run, members: int) -> dict[str, Any]:
        fused.append(run.settings.name)
        return real(run, members)

    monkeypatch.setattr(stages, "fuse", fuse)
    shutil.rmtree(tmp_path / "runs" / before[0]["folder"])
    (tmp_path / "runs" / before[1]["folder"] / "fusion-k4/bundle/weights.safetensors").unlink()
    assert run(path, tmp_path, data_dir, test=False) == before  # what is known is kept
    assert fused == []
    after = run(path, tmp_path, data_dir)
    assert fused == [row["folder"] for row in before]
    for row, old in zip(after, before, strict=True):
        assert row["test"]["4"]
        assert row["validation"]["4"] == old["validation"]["4"]
    shutil.rmtree(tmp_path / "runs" / after[0]["folder"])
    assert run(path, tmp_path, data_dir) == after  # what is read needs no bundle
    assert len(fused) == 2


def scored(name: str, recovered: float, **more: Any) -> dict[str, Any]:
    scores = {"normal_accuracy": 0.98, "recovered_accuracy": recovered}
    row = {"row": name, "data": "mnist", "seed": 1, "k": [10]}
    return {**row, "validation": {"seconds": 60.0, "10": scores}, **more}


def test_margins_are_to_the_row_that_is_named_seed_by_seed() -> None:
    rows = [
        scored("all", 0.95, against="all"),
        scored("no g'", 0.91, against="all"),
        scored("no E", 0.5, against="no g'", note="and no side features"),
        scored("all", 0.97, against="all", seed=2),
        scored("no g'", 0.92, against="all", seed=2),
        scored("no E", 0.5, against="no g'", note="and no side features", seed=2),
        scored("no E", 0.9, against="no g'", note="and no side features", seed=3),
    ]
    lines = ablation.table(rows).splitlines()
    assert lines[2] == "| 1 | all | 98.00 ± 0.00 | 96.00 ± 1.41 |  |  | 60 |"
    assert lines[3] == "| 2 | no g' | 98.00 ± 0.00 | 91.50 ± 0.71 | -4.50 ± 0.71 | 1 | 60 |"
    assert lines[4].startswith("| 3 | no E (and no side features) | 98.00 ± 0.00 | 63.33 ± 23.09 |")
    assert lines[4].endswith("| -41.50 ± 0.71 | 2 | 60 |")  # there is no other of seed 3


def test_there_is_no_margin_to_a_row_that_failed() -> None:
    rows = [scored("all", 0.95), scored("no g'", 0.91), scored("no E", 0.5, against="no g'")]
    assert "| 2 | no g' | 98.00 | 91.00 | -4.00 | 1 | 60 |" in ablation.table(rows)  # to the first
    rows[0] = {key: rows[0][key] for key in ("row", "data", "seed", "k")}
    rows[0]["error"] = "RuntimeError: a | b\nand more"
    text = ablation.table(rows)
    assert "| 1 | all | | | failed: RuntimeError: a \\| b and more | | |" in text
    assert "| 2 | no g' | 98.00 | 91.00 |  |  | 60 |" in text
    assert "| 3 | no E | 98.00 | 50.00 | -41.00 | 2 | 60 |" in text


def test_a_grid_may_change_how_finished_rows_are_shown(data_dir: Path, tmp_path: Path) -> None:
    names = ("all", "twice", "thrice")
    rows: list[dict[str, Any]] = [{"name": name, "change": {}} for name in names]
    path = grid_file(tmp_path, rows=rows, seeds=[1], k=[10])
    for trial in ablation.trials(ablation.load_grid(path), path):
        finished = {"schema_version": 1, "key": trial.key, **scored(trial.row, 0.9)}
        append_row(tmp_path / "out.jsonl", finished)
    first = run(path, tmp_path, data_dir, test=False)
    assert [(row["against"], row["note"]) for row in first] == [("all", "")] * 3
    rows[2] |= {"against": "twice", "note": "once more"}
    grid_file(tmp_path, rows=rows, seeds=[1], k=[10])
    second = run(path, tmp_path, data_dir, test=False)
    assert second == [*first[:2], {**first[2], "against": "twice", "note": "once more"}]
    assert ablation.read_results(tmp_path / "out.jsonl") == second


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


def own_key(name: str, settings: dict[str, Any]) -> str:
    return json.dumps([name, "mnist", [10], settings])


OWN = {"schema_version": 1, "key": own_key("x", {}), "row": "x", "data": "mnist", "k": [10]}
OWN |= {"seed": 1, "error": "UserError: no"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"key"', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "not of `benchmarks ablation`"),
        (b'{"row": "x"}', "not of `benchmarks ablation`"),
        (json.dumps({**OWN, "schema_version": 2}).encode(), "not of `benchmarks ablation`"),
        (json.dumps({**OWN, "key": "0" * 16}).encode(), "not of `benchmarks ablation`"),
        (json.dumps({**OWN, "key": json.dumps("abcd")}).encode(), "not of `benchmarks ablation`"),
        (json.dumps({**OWN, "row": "y"}).encode(), "not of `benchmarks ablation`"),
        (json.dumps({**OWN, "seed": None}).encode(), "not of `benchmarks ablation`"),
    ],
)
def test_a_file_of_anything_else_is_refused_as_it_is(
    line: bytes, message: str, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    content = json.dumps(OWN).encode() + b"\n" + line + b"\n"
    out.write_bytes(content)
    for quick in (False, True):
        with pytest.raises(UserError, match=rf"out\.jsonl, line 2 is {message}") as caught:
            run(grid_file(tmp_path), tmp_path, data_dir, quick=quick)
        assert "\n" not in str(caught.value)
    assert out.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.json", "out.jsonl"]


def test_rows_of_another_benchmark_are_refused(data_dir: Path, tmp_path: Path) -> None:
    append_row(tmp_path / "out.jsonl", canned.row("parm", 0.5))
    with pytest.raises(UserError, match=r"line 1 is not of `benchmarks ablation`"):
        run(grid_file(tmp_path), tmp_path, data_dir)


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
    changed = {trial.row: changed_parts(trial, found[trial.against]) for trial in others}
    assert changed.pop(PIXELS) == {"objective", "joint training", "recovery head", "side features"}
    assert {row for row, parts in changed.items() if len(parts) != 1} == set()
    seen = {trial.row: images_seen(trial) for trial in found.values()}
    assert seen.pop(PIXELS) == (165_000, 78 * 240)
    assert set(seen.values()) == {(165_000, 96_000)}
    assert "78 steps of E instead of 400, each behind five" in found[PIXELS].note
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


def seconds(runs: Path, row: dict[str, Any], parts: tuple[str, ...]) -> float:
    """Return what the network, a sampling and the parts of the fusion training say they took."""
    folder = runs / row["folder"] / "fusion-k4"
    spent = sum(load_checkpoint(folder / part / "last.safetensors")[1]["seconds"] for part in parts)
    (network,) = (runs / "networks").glob("*/network.safetensors")
    if row["row"] == "pixels":
        spent += json.loads((folder / "sample.json").read_text())["seconds"]
    return float(spent + load_checkpoint(network)[1]["seconds"])


def test_the_quick_version_takes_few_images_and_steps(data_dir: Path, tmp_path: Path) -> None:
    pixels = {"name": "pixels", "change": {"fusion": tiny_settings("pixels")["fusion"]}}
    data = {name: MNIST for name in ("mnist", "again")}
    path = grid_file(tmp_path, rows=[{"name": "all", "change": {}}, pixels], data=data, k=[4])
    rows = run(path, tmp_path, data_dir, quick=True)
    assert [(row["row"], row["data"], row["seed"], row["quick"]) for row in rows] == [
        ("all", "mnist", 1, True),
        ("pixels", "mnist", 1, True),
    ]
    assert [row.get("error") for row in rows] == [None, None]
    for row, parts in zip(rows, (("recovery", "joint"), (".",)), strict=True):
        assert row["test"]["seconds"] == row["validation"]["seconds"] > 0
        spent = seconds(tmp_path / "runs", row, parts)
        assert row["test"]["seconds"] == pytest.approx(spent, abs=0.11)  # both are rounded
    with np.load(tmp_path / "runs" / "images" / "mnist" / "train.npz") as written:
        assert written["images"].shape == (800, 28, 28, 1)  # all that there are
    found = load_images("mnist", "test", data_dir=tmp_path / "runs" / "images")
    same = load_images("mnist", "test", data_dir=data_dir)
    everything = torch.arange(len(same))
    assert found.classes == same.classes
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
        ablation.run(folder, tmp_path / "out.jsonl", save_dir=folder, data_dir=data_dir, device=CPU)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("quick", [False, True])
def test_without_images_no_trial_is_begun(tmp_path: Path, quick: bool) -> None:
    with pytest.raises(UserError, match="holds no train images"):
        run(grid_file(tmp_path), tmp_path, tmp_path, quick=quick)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]
