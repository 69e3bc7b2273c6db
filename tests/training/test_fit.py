"""The library: networks, encoders and rivals' parts trained in memory."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import codedinvnet as ci
from codedinvnet.data import ImageSet, sample_images
from codedinvnet.evaluation.accuracy import evaluate

K = 4
CODE = ci.RecoveryFusionSettings(
    members=K, epochs=1, joint_epochs=1, steps_per_epoch=4, batch_size=8, joint_batch_size=8
)
NETWORK = ci.TrainSettings(epochs=3, batch_size=50, learning_rate=3e-3)


class Own(nn.Module):
    """A network that this package knows nothing of, and that has no inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def model() -> ci.CodedModel:
    torch.manual_seed(0)
    return ci.CodedModel(
        Own(), ci.LeanFusion(1, width=4), image_shape=(1, 28, 28), classes=10, padding=2
    )


@pytest.fixture
def images() -> ImageSet:
    return sample_images("mnist")


def test_a_network_of_ones_own_and_its_code_are_trained_without_files(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = model()
    assert own.latent_shape == (16, 8, 8)
    scheme = ci.fit("coded-invnet", own, images, CODE, k=K, network=NETWORK)
    assert not own.training
    found = evaluate(scheme, images, k=K, progress=False)
    assert found.normal_accuracy > 0.5  # chance is 0.1
    assert found.recovered_accuracy > 0.2
    assert not list(tmp_path.iterdir())
    again = ci.fit("coded-invnet", model(), images, CODE, k=K, network=NETWORK)
    group = images.batch(torch.arange(K))[0][None]
    assert torch.equal(scheme.compute(K, group).output, again.compute(K, group).output)
    with pytest.raises(ci.UserError, match="no inverse"):
        ci.scheme_for(own, K, "oracle").compute(K, group)


@pytest.mark.parametrize("name", ["small-backup", "parm"])
def test_a_rivals_part_is_trained_for_a_network_that_stays(name: str, images: ImageSet) -> None:
    own = model().eval()
    before = {key: value.clone() for key, value in own.state_dict().items()}
    budget = ci.PartSettings(epochs=2, steps_per_epoch=4)
    scheme = ci.fit(name, own, images, budget, k=K)
    torch.testing.assert_close(own.state_dict(), before, rtol=0, atol=0)
    assert scheme.name == name
    assert 0 <= evaluate(scheme, images, k=K, progress=False).recovered_accuracy <= 1


def test_what_needs_no_training_is_built_and_a_wrong_budget_is_refused(images: ImageSet) -> None:
    own = model()
    found = evaluate(ci.fit("approxifer", own, images, k=K), images, k=K, progress=False)
    assert len(found.position_accuracies) == K + 1
    assert 0 <= found.agreement <= 1
    with pytest.raises(ci.UserError, match="small-backup is trained by a budget, PartSettings"):
        ci.fit("small-backup", own, images, k=K)
    with pytest.raises(ci.UserError, match="parm is not trained by RecoveryFusionSettings"):
        ci.fit("parm", own, images, CODE, k=K)


@pytest.mark.parametrize(
    ("epochs", "least"), [(1, 0.0), pytest.param(20, 90.0, marks=pytest.mark.nightly)]
)
def test_the_example_prints_a_table(
    epochs: int, least: float, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    import_module("examples.own_network").main(epochs)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["method", "normal", "recovered"]
    assert [line.split()[0] for line in lines] == ["coded-invnet", "small-backup", "approxifer"]
    assert float(lines[0].split()[2].rstrip("%")) > least
