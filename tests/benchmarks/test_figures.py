"""What `python -m benchmarks.figures` renders of whole and of partial files."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import figures
from benchmarks.figures import RESULTS, SIZES, results_page, sections
from codedinvnet.config import EncoderSettings, PixelFusionSettings, load_settings
from codedinvnet.models.bundle import Bundle, load_bundle, shipped_bundles, weights_digest
from codedinvnet.rows import append_row
from tests.bench.canned import row

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of both bundles and of the service."""
    for name in ("mnist", "fashion", "serve"):
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
    return tmp_path


def keep(path: Path, *keys: str) -> None:
    """Leave these keys alone in a file."""
    found = json.loads(path.read_text())
    path.write_text(json.dumps({key: found[key] for key in keys}))


def reproduced(seconds: float, recovered: dict[int, float], **more: Any) -> str:
    reports = {
        f"test_k{k}": {"normal_accuracy": 0.991, "recovered_accuracy": value}
        for k, value in recovered.items()
    }
    return json.dumps({"bundle": "runs/x", "seconds": seconds, **reports, **more})


def rows(table: str, name: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [line.strip("| ").split(" | ") for line in lines]


def percent(report: dict[str, float]) -> str:
    return f"{100 * report['recovered_accuracy']:.2f}"


def service(folder: Path) -> str:
    """The page's section on the service."""
    return results_page(folder, ".").partition("\n## The service\n\n")[2].partition("\n## ")[0]


def test_readme_has_the_failures_and_the_held_answers_alone(folder: Path) -> None:
    text, whole = sections(folder)["serve"], service(folder)
    figures = json.loads((folder / "serve.json").read_text())
    answers = f"{figures['answered']:,} answers, {figures['errors']} errors"
    assert answers in text
    assert answers in whole
    assert "p99.9 with held answers over" in whole
    assert "| coded+hedge |" in whole
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert table[0] == ["p99 / p99.9, ms", "uncoded", "hedge", "coded", "coded+hedge"]
    none, held, single = table[2:]
    arms = figures["straggler_arms"]
    assert held[3] == f"{arms['held/coded']['p99_ms']:.1f} / {arms['held/coded']['p999_ms']:.1f}"
    assert none[2:] == [""] * len(none[2:])
    assert all(cell.endswith(" / –") for cell in single[1:])
    keep(folder / "serve.json", "machine", "cores", "soak_seconds")
    assert sections(folder)["serve"].startswith("Not measured")


def test_an_empty_folder_is_not_measured(tmp_path: Path) -> None:
    found = sections(tmp_path)
    counted = found.pop("rivals")  # of networks that ship, or that nobody has trained
    assert all(text.startswith(("Not measured", "What they")) for text in found.values())
    plain, served = (
        [float(cell.split()[0]) for cell in rows(counted, label)[0][1:]]
        for label in ("the plain ResNet", "g(f(x))")
    )
    assert len(plain) == len(shipped_bundles())
    assert all(0.9 * f <= own <= f for own, f in zip(plain, served, strict=True))


def test_a_bundle_with_costs_alone_is_not_measured_otherwise(folder: Path) -> None:
    keep(folder / "fashion.json", "info")
    found = sections(folder)
    assert len(rows(found["bundles"], "mnist")) == len(SIZES)
    assert rows(found["bundles"], "fashion") == []
    command = "python -m benchmarks.figures --data-dir data fashion"
    assert f"Not measured: fashion; `{command}` measures it." in found["bundles"]
    costs = {line.strip("| ").split(" | ")[0]: line for line in found["costs"].splitlines()}
    info = [json.loads((folder / f"{n}.json").read_text())["info"] for n in ("mnist", "fashion")]
    macs = " | ".join(f"{i['embedding_macs'] / 1e6:.1f} M" for i in info)
    assert costs["embedding f, one image"].startswith(f"| embedding f, one image | {macs} |")
    assert costs["fixed-point iterations, mean"].endswith(" | not measured |")


def test_what_a_bundles_file_lacks_is_not_measured(folder: Path) -> None:
    keep(folder / "mnist.json", "evaluate", "side", "pixel_mean")
    (folder / "fashion.json").unlink()
    found = sections(folder)
    assert [row[3] for row in rows(found["bundles"], "mnist")] == ["not measured"] * 3
    assert [row[8:] for row in rows(found["bundles"], "mnist")] == [
        ["not measured", percent(side), "not measured"]
        for side in json.loads((folder / "mnist.json").read_text())["side"]
    ]
    checks = "with another group's parity output not measured, with the average image in place of E"
    assert "Not measured: fashion;" in found["bundles"]  # it is shipped
    assert found["costs"].startswith("Not measured")
    assert checks in results_page(folder, ".")
    path = folder / "mnist.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pixel_mean": None}))
    assert "by the recovery head g' nothing, since it reads a cell of each" in results_page(
        folder, "."
    )
    assert "points beside" not in found["bundles"]


@pytest.mark.parametrize("name", shipped_bundles())
def test_what_was_measured_of_a_bundle_is_of_the_weights_that_ship(name: str) -> None:
    assert json.loads((RESULTS / f"{name}.json").read_text())["weights"] == weights_digest(name)


def test_what_each_kind_of_evidence_is_worth_stands_below_the_table(folder: Path) -> None:
    path = folder / "mnist.json"
    found = json.loads(path.read_text())
    for arm, value in (("evaluate", 0.97), ("latent", 0.95), ("side", 0.98)):
        found[arm][-1]["recovered_accuracy"] = value
    path.write_text(json.dumps(found))
    line = "- mnist, k = 10: the latent is worth -1.00 points beside the side features, which are "
    assert f"{line}worth +2.00 beside the latent." in sections(folder)["bundles"].splitlines()


def test_a_cost_that_could_not_be_measured_is_not_measured(folder: Path) -> None:
    path = folder / "mnist.json"
    found = json.loads(path.read_text())
    found["invert"] |= {"largest_error": None, "iterations": None}
    del found["info"]["encoder_macs_k10"]  # of a bundle for smaller groups
    path.write_text(json.dumps(found))
    costs = sections(folder)["costs"]
    for label in ("largest inversion error", "fixed-point iterations", "encoder E, ten images |"):
        (line,) = [line for line in costs.splitlines() if label in line]
        assert line.split(" | ")[1] == "not measured"


@pytest.mark.parametrize("part", ["chaos", "stragglers", "variants", "soak"])
def test_a_part_of_the_service_that_is_missing_is_not_measured(folder: Path, part: str) -> None:
    whole = service(folder)
    assert "Not measured" not in whole
    path, figures = folder / "serve.json", json.loads((folder / "serve.json").read_text())
    gone = {
        "chaos": ("queries", "answered", "decoded", "least_loaded", "p50_ms"),
        "stragglers": ("straggler_arms", "batch_rate_rps", "p999_ratio_coded"),
        "variants": ("variant_arms", "blocked_rate_rps", "single_rate_qps"),
        "soak": ("soak_seconds", "soak_workers_growth"),
    }
    keep(path, *(key for key in figures if key not in gone[part]))
    text = service(folder)
    assert f"Not measured in this version: {part}; " in text
    assert f"benchmarks serve mnist --part {part} --data-dir data --out" in text
    assert len(text.split("Not measured")[0]) < len(whole)


def test_the_quick_version_has_fewer_policies(folder: Path) -> None:
    def policies() -> list[str]:
        ratios = service(folder).split("(uncoded), with 95 % intervals: ")[1].split(";")[0]
        return [ratio.split()[0] for ratio in ratios.split(", ")]

    assert policies() == ["uncoded", "hedge", "coded", "coded+hedge"]
    figures = json.loads((folder / "serve.json").read_text())
    keep(folder / "serve.json", *(key for key in figures if "hedge" not in key))
    assert policies() == ["uncoded", "coded"]


def test_the_quick_version_has_one_routing_and_a_short_soak(folder: Path) -> None:
    path = folder / "serve.json"
    figures = {**json.loads(path.read_text()), "soak_seconds": 600.0}
    path.write_text(json.dumps(figures))
    assert "killed every 5 s and another stopped every 10 s" in service(folder)
    assert "; with the default routing" in service(folder)
    assert "After 10 minutes of load" in service(folder)
    del figures["least_loaded"]
    path.write_text(json.dumps({**figures, "soak_seconds": 8.0, "harm_seconds": 2.0}))
    text = service(folder)
    assert "killed every 2 s and another stopped every 4 s" in text
    assert "; with the default routing" not in text
    assert "After 8 seconds of load" in text
    assert "Not measured" not in text


def test_a_part_alone(folder: Path) -> None:
    keep(folder / "serve.json", "machine", "cores", "pool_first_10_of_11_ms")
    assert sections(folder)["serve"].startswith(
        "Not measured in this version; `python -m benchmarks"
    )
    text = service(folder)
    assert text.startswith("Ten of eleven instant answers take")
    assert "Not measured in this version: chaos, overhead, light, stragglers" in text


def test_the_maximum_of_a_few_requests_is_no_p999(folder: Path) -> None:
    path = folder / "serve.json"
    figures = json.loads(path.read_text())
    arms = figures["straggler_arms"]
    arms["none/uncoded"] |= {"requests": 2999, "p999_ms": 77.7}
    arms["held/coded"] |= {"requests": 3000, "p999_ms": 88.8}
    path.write_text(json.dumps(figures))
    lines = service(folder).splitlines()
    (few,) = [line for line in lines if line.startswith("| nobody straggles | uncoded |")]
    assert " | – | " in few
    assert "77.7" not in few
    assert any("| coded |" in line and "| 88.8 |" in line for line in lines)


def test_the_papers_objective_stands_beside_each_row(folder: Path) -> None:
    missing = "`codedinvnet bench accuracy configs/bench/accuracy.json --data-dir data --method "
    missing += "coded-invnet-paper --out docs/results/accuracy.jsonl` measures those with a star; "
    missing += "`make bench-pixels` trains f, g and E for every place anew"
    table = sections(folder)["bundles"]
    assert table.splitlines()[0].endswith("| side alone | paper's objective |")
    assert [row[-1] for row in rows(table, "mnist")] == ["not measured"] * 3
    assert missing in table
    assert "Training took" not in table
    (folder / "pixels-mnist-k2.json").write_text(reproduced(3000, {2: 0.7408}))
    (folder / "pixels-mnist-k10.json").write_text(reproduced(6000, {10: 0.3}))
    table = sections(folder)["bundles"]
    assert [row[-1] for row in rows(table, "mnist")] == ["74.08", "not measured", "30.00"]
    assert [row[-1] for row in rows(table, "fashion")] == ["not measured"] * 3
    own = load_bundle("mnist").info.provenance.seconds / 60
    took = "mnist 50 minutes (k = 2, with f and g), 100 minutes (k = 10, with f and g), all of the "
    took += f"bundle, which serves every k, {own:.0f} minutes. "
    assert f"Training took: {took}{missing}" in table
    for name in ("mnist", "fashion"):
        for k in SIZES:
            (folder / f"pixels-{name}-k{k}.json").write_text(reproduced(60, {k: 0.5}))
    assert missing not in sections(folder)["bundles"]


def test_an_encoder_for_the_bundles_own_network_stands_in_for_a_training_from_the_start(
    folder: Path,
) -> None:
    def row(k: int, recovered: float, **changed: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            **{"schema_version": 1, "benchmark": "accuracy", "key": f"{k} {changed}"},
            **{"method": "coded-invnet-paper", "label": "coded-invnet-paper", "k": k},
            **{"dataset": "mnist", "base": "invertible", "seed": 1, "missing": 1, "corrupt": 0},
            **{"settings": {"bundle": weights_digest("mnist"), "quick": False}, "error": None},
            **{"bundle": "mnist"},
            **{"recovered": recovered, "preparing_seconds": 1800.0, "commit": "", "machine": "a"},
        }
        return {**found, **changed}

    others: list[dict[str, Any]] = [
        *({"error": "no"}, {"missing": 2}, {"corrupt": 1}, {"label": "parm"}),
        {"settings": {"bundle": "of older weights", "quick": False}},
    ]
    failed, *others = others
    lines = [row(2, 0.8), row(4, 0.7), *(row(10, 0.6, **changed) for changed in others)]
    lines += [row(k, 0.55, label="average-image") for k in (4, 10)]
    quick = {"bundle": weights_digest("mnist"), "quick": True}
    lines.append(row(4, 0.1, settings=quick, key="quick"))
    (folder / "accuracy.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "pixels-mnist-k4.json").write_text(reproduced(3000, {4: 0.7408}))
    papers = figures.paper_of("mnist", folder)
    assert [papers.cell(k) for k in SIZES] == ["80.00 *", "74.08", "not measured"]
    assert figures.paper_of("fashion", folder).on_bundle == {}
    with (folder / "accuracy.jsonl").open("a") as file:
        file.write(json.dumps(row(10, 0.6, **failed)) + "\n")
    papers = figures.paper_of("mnist", folder)
    assert [papers.cell(k) for k in SIZES] == ["80.00 *", "74.08", "failed *"]
    text = figures.paper_training({"mnist": papers})
    assert "mnist 30 minutes (k = 2, E alone), 50 minutes (k = 4, with f and g), all of the" in text
    assert "trains f, g and E for every place anew" in text
    own = load_bundle("mnist").info.provenance.machine
    assert f" These are times of 2 kinds of machines, which differ in speed: a; {own}." in text
    average = "by g, `average-image` of `bench accuracy`, 55.00 %"
    paper = "with an encoder of the paper's objective, by g, 70.00 %"
    assert figures.head_g("mnist", 4, folder) == f" ({average}; {paper})"
    assert figures.head_g("fashion", 4, folder) == ""
    checks = figures.bundle_checks(figures.bundle_results(folder), folder)
    mnist, fashion = (
        percent(json.loads((folder / f"{name}.json").read_text())["pixel_mean"])
        for name in ("mnist", "fashion")
    )
    assert f"side features, by the recovery head g' {mnist} % ({average})." in checks
    assert f"by the recovery head g' {fashion} %.\n" in checks


def test_another_seed_stands_below_the_table(folder: Path) -> None:
    recovered = {2: 0.98, 4: 0.97, 10: 0.96}
    missing = "Another seed of {}: not measured; `make bench-seeds` trains it."
    assert missing.format("mnist, fashion") in sections(folder)["bundles"].splitlines()
    (folder / "seed-fashion.json").write_text(reproduced(1, recovered, training_seed=7))
    line = "With {}, fashion reaches 99.10 normal and 98.00 / 97.00 / 96.00 recovered at "
    line += "k = 2 / 4 / 10."
    lines = sections(folder)["bundles"].splitlines()
    assert line.format("seed 7") in lines
    assert missing.format("mnist") in lines
    (folder / "seed-fashion.json").write_text(reproduced(1, recovered))
    assert line.format("another seed") in sections(folder)["bundles"].splitlines()


@pytest.mark.parametrize("name", figures.BUNDLES)
def test_the_papers_objective_has_all_but_the_fusion_in_common_with_the_bundle(name: str) -> None:
    ours = load_settings(CONFIGS / f"{name}-recovery.json")
    theirs = load_settings(CONFIGS / f"{name}-pixels.json")
    for section in ("seed", "data", "network", "training"):
        assert getattr(theirs, section) == getattr(ours, section)
    pixels, encoder = theirs.fusion, ours.fusion.encoder
    assert isinstance(pixels, PixelFusionSettings)
    width = int(math.hypot(encoder.width, encoder.cell_width))  # cost grows with its square
    expected = EncoderSettings(kind="lean", width=width, depth=encoder.depth)
    assert pixels.encoder == expected
    images = {"mnist": 60_000, "fashion": 60_000, "cifar10": 50_000}[name]
    assert 10 * pixels.groups == images - theirs.data.validation  # at k = 10, each about once


MORE = {
    "mnist-cuda.json": "Times on a CUDA machine",
    "speed-cuda.json": "Speed of the invertible network on a CUDA machine",
    "paper-full-mnist-k4.json": "The paper's settings with all their epochs",
}


def test_what_only_some_machines_measure_has_a_section_if_it_is_there(folder: Path) -> None:
    times = {"embedding_ms": 0.21, "encoder_ms_k10": 0.34, "machine": "a GPU"}
    speed = {"bundle": "mnist", "machine": "a GPU", "cores": 16, "train_ratio": 1.4}
    paper = json.loads((RESULTS / "paper-mnist-k2.json").read_text())
    contents = [{"info": times}, {**speed, "train_ratio_spread": [1.3, 1.5]}, {**paper, "k": 4}]
    plain = results_page(folder, ".")
    for (name, title), content in zip(MORE.items(), contents, strict=True):
        (folder / name).write_text(json.dumps(content))
        head, _, section = results_page(folder, ".").partition(f"\n## {title}\n\n")
        (link,) = [line for line in head.splitlines() if line.startswith(f"- [{title}](#")]
        assert head.replace(f"\n{link}", "") == plain
        assert section
        assert "not measured" not in section
        (folder / name).unlink()
    for name, content in zip(MORE, contents, strict=True):
        (folder / name).write_text(json.dumps(content))
    text = results_page(folder, ".")
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert titles[-3:] == list(MORE.values())
    assert "| embedding f, time | 0.2 ms |\n| encoder E, ten images, time | 0.3 ms |\n" in text
    assert "train_ratio                       1.40   (1.30 to 1.50 over the rounds)" in text
    normal = f"{100 * paper['normal_accuracy']:.2f}"
    assert f"`configs/paper/mnist.json`, k = 4: normal accuracy {normal} %" in text


def test_engines_are_those_that_were_measured(tmp_path: Path) -> None:
    assert "not been measured" in sections(tmp_path)["engines"]
    ratios = {"engine_ratio_query": 2.5, "engine_ratio_query_spread": [2.04, 3.0]}
    ratios |= {"engine_ratio_parity": 4.0, "engine_ratio_parity_spread": [3.9, 4.1]}
    query = {"PyTorch": {"median": 5.0}, "ONNX Runtime": {"median": 2.0}}
    parity = {"PyTorch": {"median": 8.04}, "ONNX Runtime": {"median": 2.01}}
    times = {"engine_ms_query": query, "engine_ms_parity": parity}
    report = {**times, **ratios, "machine": "a machine", "cores": 2}
    (tmp_path / "engine-fashion.json").write_text(json.dumps(report))
    text = sections(tmp_path)["engines"]
    assert text.startswith("| PyTorch → ONNX Runtime | fashion |\n")
    assert "| a query | 5.0 → 2.0 ms (2.5 times, 2.0 to 3.0) |" in text
    assert "| the parity of ten | 8.0 → 2.0 ms (4.0 times, 3.9 to 4.1) |" in text
    assert text.endswith("Measured on a machine, 2 cores.")


@pytest.fixture
def repository(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own for the command, whose texts have all marks and no figures."""
    marks = [f"<!-- figures:{name} -->\nold\n<!-- end -->\n" for name in sections(folder)]
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("".join(marks[2:]))
    (tmp_path / "docs" / "training.md").write_text(marks[0])
    (tmp_path / "docs" / "serving.md").write_text(marks[1])
    (tmp_path / "docs" / "benchmarks.md").write_text("")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", folder)
    monkeypatch.setattr(figures, "PAGE", tmp_path / "results.md")
    return tmp_path


def test_the_command_renders_the_readme_and_the_page(repository: Path) -> None:
    assert figures.main([]) == 0
    texts = [(repository / name).read_text() for name in figures.RENDERED]
    assert not any("old" in text for text in texts)
    assert "| mnist | 2 |" in texts[1]
    assert (repository / "results.md").read_text().startswith("# Results\n")


def test_what_the_grid_has_and_the_rows_have_not_is_told(tmp_path: Path) -> None:
    append_row(tmp_path / "accuracy.jsonl", row("coded-invnet", 0.9))
    assert "| oracle |  | not measured |" in sections(tmp_path)["accuracy"]
    assert "Not measured: all of fashion, cifar10. coded-invnet: mnist k = 2, 4;" in (
        results_page(tmp_path, ".")
    )


def test_an_interrupted_rendering_leaves_what_was_there(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}

    def interrupted(_: str, __: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    assert figures.main([]) == 130
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--costs", "nosuch"], "error: no bundle nosuch ships; these do: "),
        (["nosuch", "mnist"], "error: no bundle nosuch ships; these do: "),
        (["mnist"], "error: a bundle is measured with --measure or --costs"),
        (["--page", "nosuch"], "error: there is no folder nosuch"),
        (["--page", ".", "--costs"], "error: --page renders what is there"),
        (["--page", ".", "mnist"], "error: --page renders what is there"),
        (["--costs", "--device", "abacus"], "error: cannot use the device 'abacus': "),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(
    words: list[str],
    said: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository)
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    assert figures.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert told.count("\n") == 1
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


def test_a_service_that_decoded_nothing_has_no_share_of_right_ones(folder: Path) -> None:
    path = folder / "serve.json"
    figures_of = json.loads(path.read_text())
    nothing = {"decoded": 0, "decoded_accuracy": None, "decoded_accuracy_95": None}
    path.write_text(json.dumps({**figures_of, **nothing}))
    assert "0 decoded with none to score, " in sections(folder)["serve"]


def test_a_bundles_file_is_written_when_all_of_it_is_measured(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make bench-bundles` keeps one that is there."""
    path, asked = repository / "mnist.json", []
    old = json.loads(path.read_text())
    path.unlink()

    def measured(name: str, _: Bundle, data_dir: Path | None) -> dict[str, Any]:
        assert name == "mnist"
        asked.append(data_dir)
        return {key: value for key, value in old.items() if key != "info"}

    def interrupted(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "measure", measured)
    monkeypatch.setattr(figures, "info_report", interrupted)
    assert figures.main(["mnist", "--measure"]) == 130
    assert not path.exists()
    monkeypatch.setattr(figures, "info_report", lambda *_: old["info"])
    assert figures.main(["mnist", "--data-dir", "images"]) == 0
    assert json.loads(path.read_text()) == old
    assert asked == [None, Path("images")]
    monkeypatch.setattr(figures, "measure", interrupted)
    monkeypatch.setattr(figures, "info_report", lambda *_: {"embedding_macs": 1})
    assert figures.main(["mnist", "--costs"]) == 0
    assert json.loads(path.read_text()) == {**old, "info": {"embedding_macs": 1}}


def test_costs_on_another_device_have_a_file_of_their_own(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []

    def load(name: str, device: torch.device) -> str:
        loaded.append((name, device))
        return name

    monkeypatch.setattr(figures, "choose_device", torch.device)
    monkeypatch.setattr(figures, "load_bundle", load)
    monkeypatch.setattr(figures, "info_report", lambda *_: {"embedding_ms": 0.2, "machine": "it"})
    before = (repository / "mnist.json").read_bytes()
    for words in (["--device", "cuda"], ["--costs", "--device", "cuda", "--measure"]):
        assert figures.main(words) == 2
        assert "--device goes with --costs alone" in capsys.readouterr().err
    assert figures.main(["mnist", "--costs", "--device", "cuda"]) == 0
    assert loaded == [("mnist", torch.device("cuda"))]
    found = json.loads((repository / "mnist-cuda.json").read_text())
    assert found == {"info": {"embedding_ms": 0.2, "machine": "it"}}
    assert (repository / "mnist.json").read_bytes() == before


def test_a_damaged_file_is_named(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "seed-mnist.json").touch()
    assert figures.main([]) == 2
    assert "seed-mnist.json is not JSON" in capsys.readouterr().err
