"""Settings files of the paper's published code, translated into ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.config import PixelFusionSettings, Settings, load_settings
from codedinvnet.errors import UserError
from tests.conftest import put, write_settings

PUBLISHED: dict[str, Any] = {
    "data_processing": {"dataset": "fashion", "nClasses": 10},
    "name": {"iname": "iresnet", "fname": "pix2pix"},
    "train": {
        "model": {"reduction": "mean", "bottleneck_mult": 4, "nactors": 4},
        "inet": {
            "mixup_alpha": 0.7,
            "mixup": True,
            "mixup_hidden": False,
            "nBlocks": [3, 4],
            "nStrides": [1, 2],
            "nChannels": [16, 24],
            "inj_pad": 5,
            "coeff": 0.8,
            "multiScale": False,
            "fixedPrior": True,
            "noActnorm": False,
            "nonlin": "softplus",
            "init_batch": 512,
            "init_ds": 1,
        },
        "fnet": {"gan_mode": "lsgan", "ngf": 32, "ndf": 16, "netG": "unet", "lambda_L1": 100.0},
        "training_setting": {
            "epochs": 12,
            "n_epochs": 34,
            "numTraceSamples": 2,
            "numSeriesTerms": 7,
            "save_steps": 100,
        },
        "optimization": {"optimizer": "adam", "weight_decay": 0.001},
        "initialization": {"seed": 42, "cuda": True},
    },
}
PUBLISHED_UNUSED = [
    "data_processing.nClasses",
    "name.fname",
    "train.fnet.gan_mode",
    "train.fnet.lambda_L1",
    "train.fnet.netG",
    "train.inet.fixedPrior",
    "train.inet.inj_pad",
    "train.inet.mixup",
    "train.inet.multiScale",
    "train.inet.noActnorm",
    "train.inet.nonlin",
    "train.initialization.cuda",
    "train.model.bottleneck_mult",
    "train.model.reduction",
    "train.optimization.optimizer",
    "train.optimization.weight_decay",
    "train.training_setting.n_epochs",
    "train.training_setting.numSeriesTerms",
    "train.training_setting.numTraceSamples",
    "train.training_setting.save_steps",
]


def load_published(path: Path, raw: dict[str, Any]) -> tuple[Settings, str]:
    write_settings(path, raw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = load_settings(path)
    assert len(caught) == 1
    return settings, str(caught[0].message)


def test_published_settings_are_translated(tmp_path: Path) -> None:
    settings, message = load_published(tmp_path / "theirs.json", PUBLISHED)
    assert str(tmp_path / "theirs.json") in message
    unused = message.split("not used: ")[1].split(", ")
    assert sorted(unused) == PUBLISHED_UNUSED
    assert settings.seed == 42
    assert settings.data.name == "fashion"
    assert (settings.data.padding, settings.data.validation) == (2, 12_000)
    network = settings.network
    assert network.head_pooled
    assert (network.kind, network.blocks, network.strides) == ("iresnet", (3, 4), (1, 2))
    assert (network.hidden, network.coefficient) == ((16, 24), 0.8)
    assert network.initial_squeeze == 1
    training = settings.training
    assert (training.epochs, training.weight_decay, training.init_batch) == (12, 0.0, 512)
    assert (training.mixup, training.mixup_alpha) == ("none", 0.7)
    fusion = settings.fusion
    assert isinstance(fusion, PixelFusionSettings)
    assert (fusion.members, fusion.epochs) == (4, 5 * 12)  # one for each step of the discriminator
    assert (fusion.discriminator_filters, fusion.encoder.width) == (16, 32)


def test_published_unknown_data_set(tmp_path: Path) -> None:
    path = write_settings(tmp_path / "x.json", put(PUBLISHED, "data_processing.dataset", "svhn"))
    with pytest.raises(UserError, match=r"data_processing\.dataset: unknown 'svhn'"):
        load_settings(path)
