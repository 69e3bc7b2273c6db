from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codedinvnet import cli, stages
from codedinvnet.bundle import WEIGHTS, load_bundle
from codedinvnet.checkpoint import load_checkpoint
from codedinvnet.evaluation import Evaluation
from tests.conftest import Command, digests, tiny_settings, write_settings

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """Return one in which a child computes with as many threads as this process."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def commands(parser: argparse.ArgumentParser | None = None) -> dict[str, argparse.ArgumentParser]:
    """Return the commands of a parser, of the whole command line if it is None."""
    actions = (parser or cli._parser())._actions
    found = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def leaves() -> list[str]:
    """Return every command that does something, `bench serve` and the like included."""
    return [
        " ".join([name, *rest])
        for name, parser in commands().items()
        for rest in [[sub] for sub in commands(parser)] or [[]]
    ]


@pytest.mark.parametrize("name", leaves())
def test_help_shows_an_example_that_parses(name: str, call: Command) -> None:
    outcome = call(*name.split(), "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    example = outcome.out.split("example:\n")[1].strip()
    assert example.startswith(f"codedinvnet {name}")
    assert callable(cli._parser().parse_args(shlex.split(example)[1:]).run)


def test_help_of_bench_lists_its_benchmarks(call: Command) -> None:
    outcome = call("bench", "--help")
    assert outcome.code == 0
    examples = outcome.out.split("examples:\n")[1].strip().splitlines()
    assert [shlex.split(e)[2] for e in examples] == list(commands(commands()["bench"]))
    for example in examples:
        assert callable(cli._parser().parse_args(shlex.split(example)[1:]).run)


def test_every_command_is_there(call: Command) -> None:
    expected = ["train", "sample", "fuse", "evaluate", "invert", "info", "demo"]
    expected += ["serve", "bench", "simulate", "plan", "reproduce"]
    assert list(commands()) == expected
    outcome = call("--help")
    assert outcome.code == 0
    listed = [line.split()[0] for line in outcome.out.splitlines() if line.strip()]
    assert set(expected) <= set(listed)
    assert "examples:\n  codedinvnet demo" in outcome.out


def test_help_of_the_papers_command_line(call_paper: Command) -> None:
    outcome = call_paper("--help")
    assert outcome.code == 0
    for line in ("-fusion --nactors 2 -sample_fusion", "-fusion --nactors 2 -test_fusion"):
        assert f"main.py --config_file configs/mnist.json {line}\n" in outcome.out


def test_help_needs_no_heavy_imports() -> None:
    code = (
        "import sys; sys.argv = ['codedinvnet', '--help']\n"
        "from codedinvnet.errors import UserError\n"
        "before = set(sys.modules)\n"
        "import codedinvnet.cli\n"
        "print(sorted(m for m in set(sys.modules) - before if m.startswith('codedinvnet')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['codedinvnet.cli']"


def test_wrong_usage(call: Command) -> None:
    assert call().code == 2
    assert call("evaluate").code == 2
    assert call("fly", "me").code == 2


class TestPaper:
    """The paper's commands, as printed."""

    def run(self, tmp_path: Path, config: Path, data_dir: Path, flags: str) -> str:
        command = [sys.executable, "main.py", "--config_file", str(config), *flags.split()]
        places = ["--data_dir", str(data_dir), "--save_dir", str(tmp_path / "runs")]
        done = subprocess.run(
            [*command, *places], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_four_commands(self, data_dir: Path, tmp_path: Path, call_paper: Command) -> None:
        config = write_settings(tmp_path / "own.json", tiny_settings("pixels"))
        folder = tmp_path / "runs" / "tiny-pixels"
        self.run(tmp_path, config, data_dir, "")
        assert (folder / "network" / "network.safetensors").is_file()
        self.run(tmp_path, config, data_dir, "-fusion --nactors 2 -sample_fusion")
        assert list((folder / "fusion-k2" / "data").glob("train-*.safetensors"))
        self.run(tmp_path, config, data_dir, "-fusion --nactors 2")
        assert load_bundle(folder / "fusion-k2" / "bundle").info.group_sizes == (2,)
        printed = self.run(tmp_path, config, data_dir, "-fusion --nactors 2 -test_fusion")
        report = json.loads((folder / "fusion-k2" / "evaluation.json").read_text())
        assert (report["k"], report["images"], report["split"]) == (2, 200, "test")
        assert 0 <= report["recovered_accuracy"] <= 1
        assert f"recovered_accuracy       {report['recovered_accuracy']}" in printed

        places = ["--data_dir", data_dir, "--save_dir", tmp_path / "runs"]
        inversion = call_paper("--config_file", config, "-test_inversion", *places)
        assert inversion.code == 0
        figures = dict(line.split(maxsplit=1) for line in inversion.out.splitlines())
        assert float(figures["largest_error"]) < 1e-4
        assert float(figures["largest_singular_value"]) < 0.901

    def test_nactors_chooses_the_group_size(
        self, data_dir: Path, tmp_path: Path, recovery_run: stages.Run, call_paper: Command
    ) -> None:
        raw = tiny_settings("recovery")
        raw["fusion"].update(epochs=1, joint_epochs=0)
        config = write_settings(tmp_path / "own.json", raw)
        shutil.copytree(recovery_run.network_folder, tmp_path / "runs" / raw["name"] / "network")
        words = ["--config_file", config, "--data_dir", data_dir, "--save_dir", tmp_path / "runs"]
        assert call_paper(*words, "-fusion", "--nactors", "3").code == 0
        bundle = load_bundle(tmp_path / "runs" / raw["name"] / "fusion-k3" / "bundle")
        assert bundle.info.group_sizes == (2, 3)

    def test_flags_change_the_stage_that_runs(
        self, data_dir: Path, tmp_path: Path, call_paper: Command
    ) -> None:
        config = write_settings(tmp_path / "own.json", tiny_settings())
        words = ["--config_file", config, "--data_dir", data_dir, "--save_dir", tmp_path / "runs"]
        assert call_paper(*words, "--batch_size", "350", "--lr", "0.01").code == 0
        folder = tmp_path / "runs" / "tiny-recovery" / "network"
        training = load_checkpoint(folder / "last.safetensors")[1]["settings"]["training"]
        assert (training["batch_size"], training["learning_rate"]) == (350, 0.01)
        refused = call_paper(*words, "--resume", "3")
        assert refused.code == 2
        assert "training.batch_size 350 -> 50" in refused.err

    def test_density_has_a_folder_of_its_own(
        self, data_dir: Path, tmp_path: Path, call_paper: Command
    ) -> None:
        raw = tiny_settings()
        raw["training"].update(epochs=1, batch_size=350)
        config = write_settings(tmp_path / "own.json", raw)
        words = ["--config_file", config, "--data_dir", data_dir, "--save_dir", tmp_path / "runs"]
        outcome = call_paper(*words, "-densityEstimation")
        assert outcome.code == 0
        assert "validation_bits_per_dimension" in outcome.out
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny-recovery-density"]


def evaluate(
    call: Command, bundle_folder: Path, data_dir: Path, *words: str | Path
) -> dict[str, Any]:
    outcome = call("evaluate", bundle_folder, "--json", "--k", "4", "--data-dir", data_dir, *words)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert isinstance(report, dict)
    return report


def test_evaluate(call: Command, bundle_folder: Path, data_dir: Path) -> None:
    report = evaluate(call, bundle_folder, data_dir)
    assert report.keys() >= {
        "dataset",
        "split",
        "images",
        "k",
        "normal_accuracy",
        "recovered_accuracy",
        "recovered_accuracy_std",
        "worst_position_accuracy",
        "agreement",
        "groupings",
    }
    assert (report["dataset"], report["split"]) == ("mnist", "test")
    assert (report["images"], report["k"], report["groupings"]) == (200, 4, 5)
    assert report["worst_position_accuracy"] <= report["recovered_accuracy"]
    assert len(report["position_accuracies"]) == 4


def test_evaluate_is_repeatable_and_the_seed_counts(
    call: Command, bundle_folder: Path, data_dir: Path
) -> None:
    first = evaluate(call, bundle_folder, data_dir)
    assert evaluate(call, bundle_folder, data_dir) == first
    other = evaluate(call, bundle_folder, data_dir, "--seed", "1", "--groupings", "2")
    assert other["groupings"] == 2
    assert other["position_accuracies"] != first["position_accuracies"]
    assert other["normal_accuracy"] == first["normal_accuracy"]


def test_evaluate_arms_and_splits(call: Command, bundle_folder: Path, data_dir: Path) -> None:
    plain = evaluate(call, bundle_folder, data_dir)
    mean = evaluate(call, bundle_folder, data_dir, "--pixel-mean")
    shuffled = evaluate(call, bundle_folder, data_dir, "--shuffle-parity")
    arms = [report["parity"] for report in (plain, mean, shuffled)]
    assert arms == ["encoder", "pixel mean", "encoder, shuffled"]
    latent = evaluate(call, bundle_folder, data_dir, "--evidence", "latent")
    side = evaluate(call, bundle_folder, data_dir, "--evidence", "side")
    reports = [plain, mean, shuffled, latent, side]
    assert [report["evidence"] for report in reports] == ["both"] * 3 + ["latent", "side"]
    assert len({tuple(report["position_accuracies"]) for report in reports}) == 5
    sizes = {
        split: evaluate(call, bundle_folder, data_dir, "--split", split)["images"]
        for split in ("train", "validation", "sample")
    }
    assert sizes == {"train": 700, "validation": 100, "sample": 1000}


def test_evaluate_as_a_table(call: Command, bundle_folder: Path, data_dir: Path) -> None:
    outcome = call("evaluate", bundle_folder, "--k", "2", "--data-dir", data_dir)
    assert outcome.code == 0
    words = [line.split()[0] for line in outcome.out.splitlines()]
    assert {"recovered_accuracy", "agreement", "machine"} <= set(words)


def test_invert(call: Command, bundle_folder: Path, data_dir: Path) -> None:
    outcome = call("invert", bundle_folder, "--json", "--data-dir", data_dir, "--limit", "30")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert report["images"] == 30
    assert report["largest_error"] < 1e-4
    assert 0 < report["largest_singular_value"] <= report["coefficient"] + 1e-5
    assert report["coefficient"] == 0.9
    assert report["iterations"] > 1
    loose = call(
        "invert", bundle_folder, "--json", "--split", "sample", "--limit", "30", "--tolerance", "1"
    )
    assert json.loads(loose.out)["iterations"] < report["iterations"]


def test_info(call: Command, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codedinvnet.report.REPEATS", 3)
    outcome = call("info", bundle_folder, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    model = load_bundle(bundle_folder).model
    assert report["embedding_parameters"] == sum(p.numel() for p in model.network.parameters())
    # One channel of 32 x 32, squeezed once and twice: 3x3, 1x1, 3x3 convolutions of 8 channels.
    first = (4 * 8 * 9 + 8 * 8 + 8 * 4 * 9) * 16 * 16
    second = (16 * 8 * 9 + 8 * 8 + 8 * 16 * 9) * 8 * 8
    assert report["embedding_macs"] == first + second
    assert report["head_macs"] == 32 * 32 * 10
    assert 0 < report["encoder_macs_k2"] < report["encoder_macs_k4"] < 2 * report["encoder_macs_k2"]
    assert "encoder_macs_k10" not in report  # not served
    assert report["embedding_ms"] > 0
    assert report["encoder_ms_k4"] > 0
    assert report["group_sizes"] == [2, 3, 4]
    assert report["provenance"]["settings"]["name"] == "tiny-recovery"


def test_reproduce_twice(call: Command, data_dir: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "own.json", tiny_settings())
    words = ["reproduce", config, "--data-dir", data_dir, "--save-dir", tmp_path / "runs", "--json"]
    began = time.monotonic()
    first = call(*words)
    middle = time.monotonic()
    assert first.code == 0, first.err
    report = json.loads(first.out)  # one object, and nothing else on standard output
    assert report.keys() == {"bundle", "test_k2", "test_k4"}
    folder = tmp_path / "runs" / "tiny-recovery"
    checkpoints = [*folder.rglob("last.safetensors"), *folder.rglob("best.safetensors")]
    assert len(checkpoints) == 6
    stamps = {path: path.stat().st_mtime_ns for path in checkpoints}
    weights = Path(report["bundle"]) / WEIGHTS
    before = weights.read_bytes()
    info = load_bundle(report["bundle"]).info
    assert info.figures["test_k4"] == report["test_k4"]

    again = time.monotonic()
    second = call(*words)
    seconds = time.monotonic() - again
    assert second.code == 0, second.err
    assert json.loads(second.out) == report
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == stamps
    assert weights.read_bytes() == before
    assert "epoch 1/" not in second.err + second.out
    assert seconds < middle - began


def test_train_kill_resume(call: Command, data_dir: Path, tmp_path: Path) -> None:
    raw = tiny_settings()
    raw["training"]["epochs"] = 12
    config = write_settings(tmp_path / "own.json", raw)
    words = ["train", str(config), "--data-dir", str(data_dir), "--save-dir"]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    last = broken / raw["name"] / "network" / "last.safetensors"
    start = "import sys; from codedinvnet.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", start, *words, str(broken)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not last.is_file():
            assert process.poll() is None, "it ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    reached = load_checkpoint(last)[1]["epoch"]
    assert 1 <= reached < 12
    assert not (last.parent / "network.safetensors").exists()
    resumed = call(*words, broken, "--resume")
    assert resumed.code == 0, resumed.err
    assert "epoch 12/12" in resumed.err + resumed.out
    assert f"epoch {reached}/12" not in resumed.err + resumed.out
    assert call(*words, unbroken).code == 0
    for name in ("network.safetensors", "best.safetensors", "last.safetensors"):
        expected, _ = load_checkpoint(unbroken / raw["name"] / "network" / name)
        found, _ = load_checkpoint(broken / raw["name"] / "network" / name)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_interrupt_is_not_a_traceback(
    call: Command, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: stages.Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train", interrupted)
    config = write_settings(tmp_path / "own.json", tiny_settings())
    outcome = call("train", config, "--data-dir", data_dir, "--save-dir", tmp_path / "runs")
    assert outcome.code == 130
    assert "--resume" in outcome.err


def test_device_reaches_the_stages(
    call: Command, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[stages.Run] = []

    def fake(run: stages.Run) -> dict[str, Any]:
        seen.append(run)
        return {"validation": {"x": 1.0}}

    monkeypatch.setattr(stages, "train", fake)
    config = write_settings(tmp_path / "own.json", tiny_settings())
    outcome = call("train", config, "--data-dir", data_dir, "--device", "cpu", "--resume")
    assert outcome.code == 0
    (run,) = seen
    assert (run.device, run.resume, run.save_dir) == (torch.device("cpu"), -1, Path("runs"))
    assert outcome.out.splitlines() == [
        "network  runs/tiny-recovery/network",
        "x        1.0",
    ]


def test_demo_names_only_what_ships(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []
    monkeypatch.setattr("codedinvnet.bundle.shipped_bundles", lambda: ("fashion", "other"))
    monkeypatch.setattr("codedinvnet.demo.run_demo", lambda names, out, seed: asked.append(names))
    assert call("demo", "--out", tmp_path).code == 0
    assert asked == [["fashion"]]


class Scene:
    """Files that the bad commands of the table below name."""

    def __init__(self, root: Path, data_dir: Path, run: stages.Run) -> None:
        self.root, self.data = root, data_dir
        self.runs = Path(shutil.copytree(run.save_dir, root / "runs"))
        self.bundle = self.runs / "tiny-recovery" / "fusion-k4" / "bundle"
        self.config = write_settings(root / "recovery.json", tiny_settings())
        self.pixels = write_settings(root / "pixels.json", tiny_settings("pixels"))
        self.cut = Path(shutil.copytree(self.bundle, root / "cut"))
        weights = self.cut / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-100])
        self.large = root / "large"
        (self.large / "mnist").mkdir(parents=True)
        for split in ("train", "test"):
            images = np.zeros((900, 32, 32), dtype=np.uint8)
            np.savez(self.large / "mnist" / split, images=images, labels=np.arange(900) % 10)

    def changed(self, section: str, key: str, value: Any) -> Path:
        raw = deepcopy(tiny_settings())
        raw[section][key] = value
        return write_settings(self.root / "changed.json", raw)


Words = Callable[[Scene], list[Any]]


def train(s: Scene, config: Path, data: Path) -> list[Any]:
    return ["train", config, "--data-dir", data, "--save-dir", s.runs]


def stage(s: Scene, name: str, config: Path, *more: Any) -> list[Any]:
    return [name, config, "--data-dir", s.data, "--save-dir", s.runs, *more]


def use(s: Scene, name: str, bundle: Any, *more: Any) -> list[Any]:
    return [name, bundle, "--data-dir", s.data, *more]


BAD: dict[str, tuple[Words, str]] = {
    "no data folder": (lambda s: train(s, s.config, s.root / "no"), "does not exist"),
    "empty data folder": (lambda s: train(s, s.config, s.bundle), "holds no train images"),
    "no settings": (lambda s: train(s, s.root / "no.json", s.data), "cannot read the settings"),
    "settings not JSON": (lambda s: train(s, s.bundle / WEIGHTS, s.data), "not text"),
    "unknown key": (
        lambda s: train(s, s.changed("training", "epoch", 3), s.data),
        "did you mean 'epochs'",
    ),
    "one member": (
        lambda s: train(s, s.changed("fusion", "members", 1), s.data),
        "fusion.members",
    ),
    "too many for validation": (
        lambda s: train(s, s.changed("data", "validation", 800), s.data),
        "cannot set 800 of 800 images aside",
    ),
    "size that no squeeze divides": (
        lambda s: train(s, s.changed("data", "padding", 1), s.data),
        "do not fit 1x30x30 inputs",
    ),
    "image of another size": (
        lambda s: use(s, "evaluate", s.bundle, "--k", "2", "--data-dir", s.large),
        "takes (1, 28, 28)",
    ),
    "invert another size": (
        lambda s: use(s, "invert", s.bundle, "--data-dir", s.large),
        "takes (1, 28, 28)",
    ),
    "k = 1": (lambda s: use(s, "evaluate", s.bundle, "--k", "1"), "groups of 2 to 4, got k = 1"),
    "k = 5": (lambda s: use(s, "evaluate", s.bundle, "--k", "5"), "groups of 2 to 4, got k = 5"),
    "sample k = 1": (lambda s: stage(s, "sample", s.pixels, "--k", "1"), "at least 2, got 1"),
    "fuse k = 0": (lambda s: stage(s, "fuse", s.config, "--k", "0"), "at least 2, got 0"),
    "no groupings": (
        lambda s: use(s, "evaluate", s.bundle, "--k", "2", "--groupings", "0"),
        "groupings must be at least 1",
    ),
    "unknown bundle": (lambda s: use(s, "evaluate", "minst"), "no bundle 'minst'"),
    "info of no bundle": (lambda s: ["info", s.data], "neither a folder with bundle.json"),
    "truncated weights": (lambda s: use(s, "evaluate", s.cut, "--k", "2"), "truncated"),
    "info of truncated weights": (lambda s: ["info", s.cut, "--json"], "truncated"),
    "negative limit": (lambda s: use(s, "invert", s.bundle, "--limit", "-1"), "limit"),
    "no device": (
        lambda s: use(s, "evaluate", s.bundle, "--device", "abacus"),
        "cannot use the device 'abacus'",
    ),
    "sample of recovery": (lambda s: stage(s, "sample", s.config), "has no fusion data set"),
    "sample before train": (lambda s: stage(s, "sample", s.pixels), "train it first"),
    "fuse before train": (lambda s: stage(s, "fuse", s.pixels), "train it first"),
    "resume with other settings": (
        lambda s: stage(s, "train", s.changed("training", "weight_decay", 0.5), "--resume"),
        "training.weight_decay 0.0005 -> 0.5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, recovery_run: stages.Run, data_dir: Path, tmp_path: Path, call: Command
) -> None:
    words, said = BAD[case]
    scene = Scene(tmp_path, data_dir, recovery_run)
    command = words(scene)
    before = digests(tmp_path, data_dir)
    outcome = call(*command)
    check_refusal(outcome.code, outcome.out, outcome.err, said)
    assert digests(tmp_path, data_dir) == before


def check_refusal(code: int, out: str, err: str, said: str) -> None:
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]


def test_save_dir_that_is_a_file(call: Command, data_dir: Path, tmp_path: Path) -> None:
    config = write_settings(tmp_path / "own.json", tiny_settings())
    outcome = call("train", config, "--data-dir", data_dir, "--save-dir", config)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]  # the progress bar has begun above it
    assert last.startswith("error: ")
    assert str(config) in last
    assert "Traceback" not in outcome.err


BAD_PAPER: dict[str, tuple[list[str], str]] = {
    "sample without fusion": (["-sample_fusion"], "go with -fusion"),
    "test without fusion": (["-test_fusion"], "go with -fusion"),
    "negative resume": (["--resume", "-1"], "--resume must be 0 or an epoch"),
    "no steps": (["--nsteps_save", "0"], "--nsteps_save at least 1"),
    "one actor": (["-fusion", "--nactors", "1"], "at least 2, got 1"),
    "batch of one": (["--batch_size", "1"], "training.batch_size"),
    "fusion batch of none": (["-fusion", "--batch_size", "0"], "fusion.batch_size"),
    "rate not a number": (["--lr", "nan"], "training.learning_rate"),
    "no encoder": (["-fusion", "--nactors", "2", "-test_fusion"], "no trained fusion encoder"),
    "no checkpoint": (["-densityEstimation", "--resume", "2"], "no checkpoint"),
    "another epoch": (["--resume", "2"], "is of epoch 3"),
    "no fusion checkpoint": (["-fusion", "--nactors", "3", "--resume", "1"], "cannot resume"),
}


@pytest.mark.parametrize("case", BAD_PAPER)
def test_bad_input_of_the_papers_command_line(
    case: str, recovery_run: stages.Run, data_dir: Path, tmp_path: Path, call_paper: Command
) -> None:
    words, said = BAD_PAPER[case]
    scene = Scene(tmp_path, data_dir, recovery_run)
    before = digests(tmp_path, data_dir)
    places = ["--data_dir", data_dir, "--save_dir", scene.runs]
    outcome = call_paper("--config_file", scene.config, *places, *words)
    check_refusal(outcome.code, outcome.out, outcome.err, said)
    assert digests(tmp_path, data_dir) == before


def test_no_traceback_from_a_real_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "main.py", "--config_file", str(tmp_path / "no.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    check_refusal(done.returncode, done.stdout, done.stderr, "cannot read the settings file")


def test_report_of_evaluation_needs_every_field() -> None:
    from codedinvnet.report import figures

    result = Evaluation(10, 2, 5, 0.9, 0.8, 0.01, (0.7, 0.9), 0.85)
    assert figures(result) == {
        "images": 10,
        "k": 2,
        "groupings": 5,
        "normal_accuracy": 0.9,
        "recovered_accuracy": 0.8,
        "recovered_accuracy_std": 0.01,
        "worst_position_accuracy": 0.7,
        "agreement": 0.85,
    }
