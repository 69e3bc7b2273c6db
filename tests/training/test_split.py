from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageSet, sample_images, split_indices
from codedinvnet.models.bundle import Bundle, load_bundle, save_bundle
from codedinvnet.training.images import bundle_split, validation_digests

ASIDE, SEED = 100, 3


@pytest.fixture(scope="module")
def source() -> ImageSet:
    return sample_images("mnist")


@pytest.fixture(scope="module")
def trained(source: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that says that it was trained on the source."""
    bundle = load_bundle("mnist")
    made = bundle.info.provenance
    data = made.settings.data.model_copy(update={"validation": ASIDE})
    told = made.settings.model_copy(update={"data": data, "seed": SEED})
    made = made.model_copy(update={"images": source.digest(), "settings": told})
    info = bundle.info.model_copy(update={"provenance": made})
    folder = tmp_path_factory.mktemp("trained")
    save_bundle(folder, info, bundle.model, validation_digests(told, source))
    return load_bundle(folder)


def split(bundle: Bundle, source: ImageSet) -> tuple[Tensor, Tensor]:
    train, aside = bundle_split(bundle, source, "bundle 'own'")
    assert sorted([*train.tolist(), *aside.tolist()]) == list(range(len(source)))
    return train, aside


def ordered(source: ImageSet, rows: Tensor) -> ImageSet:
    return replace(source, images=source.images[rows], labels=source.labels[rows])


def inverted(source: ImageSet, rows: Tensor) -> ImageSet:
    images = source.images.clone()
    images[rows] = 255 - images[rows]
    return replace(source, images=images)


def test_images_in_order_are_split_as_the_training_did(source: ImageSet, trained: Bundle) -> None:
    for found, expected in zip(
        split(trained, source), split_indices(len(source), ASIDE, SEED), strict=True
    ):
        assert torch.equal(found, expected)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_any_order_gives_the_same_images(source: ImageSet, trained: Bundle, seed: int) -> None:
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    found = split(trained, ordered(source, order))
    for rows, expected in zip(found, split(trained, source), strict=True):
        assert torch.equal(order[rows].sort().values, expected)
        assert torch.equal(rows, rows.sort().values)


def test_an_image_that_equals_one_set_aside_counts_as_set_aside(
    source: ImageSet, trained: Bundle
) -> None:
    train, aside = split(trained, source)
    rows = torch.arange(len(source))
    rows[train[0]] = aside[0]
    twice = ordered(source, rows)
    assert torch.equal(split(trained, twice)[1], torch.cat([aside, train[:1]]).sort().values)
    labels = twice.labels.clone()
    labels[train[0]] = (labels[train[0]] + 1) % 10
    assert torch.equal(split(trained, replace(twice, labels=labels))[1], aside)


def test_other_images_are_refused(source: ImageSet, trained: Bundle) -> None:
    _, aside = split(trained, source)
    others = inverted(source, torch.arange(len(source)))
    for other, told in (
        (others, "it has 0 of the 100 that were set aside for validation, and 1000 others"),
        (ordered(source, aside), "it has 100 of the 100 .*, and 0 others"),
    ):
        with pytest.raises(UserError, match="other training images than bundle 'own'.*" + told):
            bundle_split(trained, other, "bundle 'own'")
