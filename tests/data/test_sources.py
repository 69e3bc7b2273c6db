from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageRows, load_images
from tests.data.files import GREY, LABELS, everything, write_npz

# --- ImageSet


def test_the_digest_of_an_image_goes_by_its_pixels_and_label(tmp_path: Path) -> None:
    digests = []
    pixel, label = (GREY.copy(), LABELS), (GREY, LABELS.copy())
    pixel[0][3, 0, 0] ^= 1
    label[1][4] = 0
    for number, (images, labels) in enumerate(((GREY, LABELS), pixel, label)):
        write_npz(tmp_path, f"own{number}", images=images, labels=labels)
        source = load_images(f"own{number}", "train", data_dir=tmp_path)
        digests.append(source.image_digests())
    assert digests[0].dtype == torch.int64
    assert len(digests[0].unique()) == len(GREY)
    assert [(found != digests[0]).nonzero().tolist() for found in digests[1:]] == [[[3]], [[4]]]


# --- ImageRows


def test_rows_of_a_source(tmp_path: Path) -> None:
    write_npz(tmp_path, images=GREY, labels=LABELS)
    whole = load_images("own", "train", data_dir=tmp_path)
    source = ImageRows(whole, torch.tensor([5, 1, 3]), "some of them")
    images, labels = everything(source)
    assert np.array_equal(images[:, 0], GREY[[5, 1, 3]])
    assert labels == source.labels.tolist() == LABELS[[5, 1, 3]].tolist()
    assert (source.name, source.classes, source.shape) == ("own", ("0", "1", "2"), (1, 5, 4))
    assert source.digest() == ImageRows(whole, source.rows, "again").digest()
    assert source.digest() != ImageRows(whole, source.rows.flip(0), "in another order").digest()
    assert torch.equal(source.image_digests(), whole.image_digests()[source.rows])
    with pytest.raises(UserError, match=r"the rest: no images of .*train\.npz"):
        ImageRows(whole, torch.arange(0), "the rest")
