from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.evaluation import stages
from codedinvnet.models.bundle import load_bundle
from codedinvnet.models.checkpoint import load_checkpoint
from tests.cli.scene import ROOT, Scene, check_refusal, environment
from tests.conftest import Command, digests, tiny_settings, write_settings
from tests.data.files import write_idx


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
        """The last of them in a process of its own."""
        config = write_settings(tmp_path / "own.json", tiny_settings("pixels"))
        folder = tmp_path / "runs" / "tiny-pixels"
        words = ("--config_file", config)
        places = ("--data_dir", data_dir, "--save_dir", tmp_path / "runs")
        assert call_paper(*words, *places).code == 0
        assert (folder / "network" / "network.safetensors").is_file()
        fusion = (*words, "-fusion", "--nactors", "2", *places)
        assert call_paper(*fusion, "-sample_fusion").code == 0
        assert list((folder / "fusion-k2" / "data").iterdir())
        assert call_paper(*fusion).code == 0
        assert load_bundle(folder / "fusion-k2" / "bundle").info.group_sizes == (2,)
        printed = self.run(tmp_path, config, data_dir, "-fusion --nactors 2 -test_fusion")
        report = json.loads((folder / "fusion-k2" / "evaluation.json").read_text())
        assert (report["k"], report["images"], report["split"]) == (2, 200, "test")
        assert 0 <= report["recovered_accuracy"] <= 1
        assert f"recovered_accuracy       {report['recovered_accuracy']}" in printed

        inversion = call_paper(*words, "-test_inversion", *places)
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


def test_what_a_data_folder_lacks_is_downloaded_into_it_unless_it_was_asked_for(
    tmp_path: Path, call_paper: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)

    def downloads(url: str, download_root: str, **_: Any) -> None:
        write_idx(Path(download_root))

    def trains(run: stages.Run) -> dict[str, Any]:
        return {"validation": {"images": len(run.images("train"))}}

    fetch = "torchvision.datasets.mnist.download_and_extract_archive"
    monkeypatch.setattr(fetch, downloads)
    monkeypatch.setattr(stages, "train", trains)
    words = ("--config_file", write_settings(tmp_path / "own.json", tiny_settings()))
    for option in ("--data_dir", "--data-dir"):  # as messages name it
        refused = call_paper(*words, option, "data")
        check_refusal(refused.code, refused.out, refused.err, "name no data folder to download")
    done = call_paper(*words)
    assert done.code == 0, done.err
    assert [path.name for path in Path("data").iterdir()] == ["MNIST"]


BAD_PAPER: dict[str, tuple[list[str], str]] = {
    "sample without fusion": (["-sample_fusion"], "go with -fusion"),
    "negative resume": (["--resume", "-1"], "--resume must be 0 or an epoch"),
    "one actor": (["-fusion", "--nactors", "1"], "at least 2, got 1"),
    "idle resume": (["-test_inversion", "--resume", "1"], "--resume changes nothing of this"),
    "idle rate": (["-fusion", "-test_fusion", "--lr", "0.1"], "--lr changes nothing of this"),
    "idle actors": (["--nactors", "4"], "--nactors changes nothing of this stage"),
    "rate of two phases": (["-fusion", "--lr", "0.1"], "fusion.joint_learning_rate: change them"),
    "batch of one": (["--batch_size", "1"], "training.batch_size"),
    "rate not a number": (["--lr", "nan"], "training.learning_rate"),
    "no encoder": (["-fusion", "--nactors", "2", "-test_fusion"], "no trained fusion encoder"),
    "another epoch": (["--resume", "2"], "is of epoch 3"),
    "runs that cannot be kept": (
        ["--save_dir", "/dev/null/runs"],
        "--save_dir: cannot write into /dev/null/runs",
    ),
    "sample of recovery": (["-fusion", "-sample_fusion"], "has no fusion data set"),
    "sample before train": (["--config_file", "PIXELS", "-fusion", "-sample_fusion"], "train it"),
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
    given = [scene.pixels if word == "PIXELS" else word for word in words]
    outcome = call_paper("--config_file", scene.config, *places, *given)
    check_refusal(outcome.code, outcome.out, outcome.err, said)
    assert digests(tmp_path, data_dir) == before
