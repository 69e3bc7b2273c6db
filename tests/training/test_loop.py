from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.common.config import Settings, parse_settings
from codedinvnet.common.errors import UserError
from codedinvnet.data import load_images
from codedinvnet.models.checkpoint import load_checkpoint
from codedinvnet.training.loop import LATEST, Stage, train_stage, warmup_cosine
from codedinvnet.training.network import NetworkStage, network_settings
from tests.conftest import tiny_settings
from tests.training.runs import network_stage


def test_rate_rises_then_falls() -> None:
    total, warmup = 100, 0.1
    factors = [warmup_cosine(step, total, warmup) for step in range(total)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.001
    assert warmup_cosine(total, total, warmup) == pytest.approx(0.0)


class Scripted(Stage):
    """A stage that counts its steps in its one weight and is scored by a list."""

    name = "scripted"

    def __init__(self, scores: list[float], losses: list[float] | None = None) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.module.weight)
        optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        super().__init__(
            {"module": self.module},
            {"optimizer": optimizer},
            rate=0.1,
            epochs=len(scores),
            steps_per_epoch=2,
        )
        self.scores, self.losses = scores, losses or [0.5] * len(scores)
        self.epoch = -1
        self.drawn: list[int] = []

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        assert self.module.training
        self.epoch = epoch
        self.drawn.append(int(torch.randint(10**9, (), generator=generator)))

    def batch_loss(self, index: int) -> Tensor:
        raise NotImplementedError

    def step(self, epoch: int, index: int) -> Mapping[str, float]:
        with torch.no_grad():
            self.module.weight += 1
        return {"loss": self.losses[epoch]}

    def validate(self) -> tuple[float, Mapping[str, float]]:
        assert not self.module.training
        return self.scores[self.epoch], {"score": self.scores[self.epoch]}


def run(stage: Scripted, folder: Path, **options: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"epochs": len(stage.scores), "seed": 1, "settings": {"a": 1}}
    return train_stage(stage, folder, **{**chosen, **options})


def weight(path: Path) -> float:
    return float(load_checkpoint(path)[0]["module.weight"])


def test_best_and_last_are_kept(tmp_path: Path) -> None:
    stage = Scripted([0.1, 0.9, 0.5, 0.9])
    header = run(stage, tmp_path, keep={"classes": ["x"]})
    assert weight(tmp_path / "last.safetensors") == 8
    assert weight(tmp_path / "best.safetensors") == 4  # the earlier of two equals
    assert float(stage.module.weight.detach()) == 4  # the stage ends with its best weights
    assert (header["epoch"], header["epochs"], header["score"]) == (2, 4, 0.9)
    assert header["validation"] == {"score": 0.9}
    assert header["classes"] == ["x"]
    last = load_checkpoint(tmp_path / "last.safetensors")[1]
    assert (last["epoch"], last["best_score"]) == (4, 0.9)
    best = load_checkpoint(tmp_path / "best.safetensors")[1]
    assert header == {**best, "seconds": last["seconds"]}  # the epochs behind the best took time
    assert best["seconds"] < last["seconds"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_training_in_memory_ends_as_one_with_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = Scripted([0.1, 0.9, 0.5, 0.9])
    header = train_stage(stage, epochs=4, seed=1)
    assert float(stage.module.weight.detach()) == 4
    assert (header["epoch"], header["validation"]) == (2, {"score": 0.9})
    assert not list(tmp_path.iterdir())


def test_starting_over_sets_the_old_checkpoints_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Scripted([0.1, 0.9]), tmp_path)
    kept = {name: (tmp_path / f"{name}.safetensors").read_bytes() for name in ("last", "best")}
    assert "starts over" not in capsys.readouterr().err
    run(Scripted([0.3]), tmp_path)
    first = tmp_path / "checkpoints-before-1"
    assert f"starts over; the old checkpoints are in {first}" in capsys.readouterr().err
    assert weight(tmp_path / "last.safetensors") == 2
    (tmp_path / "last.safetensors").unlink()  # as of a kill between the two
    run(Scripted([0.2]), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints-before-2").iterdir()] == [
        "best.safetensors"
    ]
    for name, content in kept.items():
        assert (first / f"{name}.safetensors").read_bytes() == content


def test_best_survives_a_resumed_worse_epoch(tmp_path: Path) -> None:
    run(Scripted([0.9, 0.1]), tmp_path)
    stage = Scripted([0.9, 0.1, 0.5])
    header = run(stage, tmp_path, resume=LATEST)
    assert len(stage.drawn) == 1
    assert header["epoch"] == 1
    assert weight(tmp_path / "best.safetensors") == 2
    assert weight(tmp_path / "last.safetensors") == 6
    before, again = (tmp_path / "last.safetensors").read_bytes(), Scripted([0.9, 0.1, 0.5])
    assert run(again, tmp_path, resume=LATEST)["seconds"] == header["seconds"]  # it is finished
    assert again.drawn == []
    assert float(again.module.weight.detach()) == 2
    assert (tmp_path / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_keeps_the_last_good_epoch(bad: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite in epoch 2"):
        run(Scripted([0.1, 0.2], losses=[0.5, bad]), tmp_path)
    assert weight(tmp_path / "last.safetensors") == 2
    assert weight(tmp_path / "best.safetensors") == 2


def test_resume_of_other_settings_names_them(tmp_path: Path) -> None:
    run(Scripted([0.1]), tmp_path, settings={"training": {"rate": 0.1}, "same": 1})
    with pytest.raises(UserError, match=r"other settings \(training.rate 0.1 -> 0.2\)"):
        run(
            Scripted([0.1, 0.2]),
            tmp_path,
            settings={"training": {"rate": 0.2}, "same": 1},
            resume=1,
        )


class Meeting(Scripted):
    """A stage in whose step another one starts in the same folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__([0.5])
        self.folder = folder

    def step(self, epoch: int, index: int) -> Mapping[str, float]:
        with pytest.raises(UserError, match="another process trains here"):
            run(Scripted([0.1]), self.folder, resume=LATEST)
        return super().step(epoch, index)


def test_two_trainings_do_not_mix_in_a_folder(tmp_path: Path) -> None:
    run(Meeting(tmp_path), tmp_path)
    assert weight(tmp_path / "last.safetensors") == 2
    run(Scripted([0.1, 0.2]), tmp_path, resume=LATEST)  # the first has ended
    assert weight(tmp_path / "last.safetensors") == 4


class Interrupted(NetworkStage):
    """Breaks off in the middle of its third epoch."""

    def step(self, epoch: int, index: int) -> Mapping[str, float]:
        if epoch == 2 and index == 3:
            raise KeyboardInterrupt
        return super().step(epoch, index)


def network_run(
    kind: type[NetworkStage], settings: Settings, data_dir: Path, folder: Path, resume: int = 0
) -> NetworkStage:
    stage = network_stage(settings, load_images("mnist", "train", data_dir=data_dir), kind)
    train_stage(
        stage,
        folder,
        epochs=settings.training.epochs,
        seed=settings.seed,
        settings=network_settings(settings),
        resume=resume,
    )
    return stage


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_checkpoint(path)[0]


@pytest.mark.parametrize(("kind", "resume"), [("iresnet", LATEST), ("irevnet", 2)])
def test_resumed_training_equals_an_unbroken_one(
    kind: str, resume: int, data_dir: Path, tmp_path: Path
) -> None:
    raw = tiny_settings(kind=kind)
    raw["training"].update(flip=True, shift=2)  # every source of randomness
    settings = parse_settings(raw, "here")
    network_run(NetworkStage, settings, data_dir, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        network_run(Interrupted, settings, data_dir, tmp_path / "broken")
    assert load_checkpoint(tmp_path / "broken" / "last.safetensors")[1]["epoch"] == 2
    torch.manual_seed(999)  # nothing may hang on the process's own random state
    network_run(NetworkStage, settings, data_dir, tmp_path / "broken", resume)
    for name in ("last.safetensors", "best.safetensors"):
        expected = tensors_of(tmp_path / "unbroken" / name)
        found = tensors_of(tmp_path / "broken" / name)
        assert found.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(expected[key], found[key])]
        assert different == []
