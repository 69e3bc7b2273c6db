"""Small classifiers, as they are built and read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from codedinvnet.checkpoint import module_tensors, save_checkpoint
from codedinvnet.models.base import TensorSpec
from codedinvnet.protect.folder import load_part, save_part
from codedinvnet.protect.students import Shape, words_of

SPECS = (TensorSpec("ids", "INT64", (20,)), TensorSpec("mask", "INT64", (20,)))


def batch() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, words, (5, 20)) for words in (1000, 2)]


def test_each_input_has_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    """A mask needs no table for all the words that may stand beside it."""
    ids, mask = batch()
    assert words_of([ids, mask]) == (1 + ids.max(), 2)
    student, larger = (
        Shape("tokens", 4, 3, SPECS, w).build().eval() for w in ((1000, 2), (1000,) * 2)
    )
    sizes = [sum(weights.numel() for weights in part.parameters()) for part in (student, larger)]
    assert sizes[1] - sizes[0] == 4 * 998
    save_part(tmp_path / "part", student)
    with torch.inference_mode():
        wanted = student(torch.from_numpy(ids), torch.from_numpy(mask))
        found = load_part(tmp_path / "part")(torch.from_numpy(ids), torch.from_numpy(mask))
        beyond = student(torch.from_numpy(ids), torch.from_numpy(np.where(mask == 1, 7, 0)))
    assert torch.equal(found, wanted)
    assert torch.equal(beyond, wanted)  # what was never seen counts as the largest that was


def test_a_small_backup_of_one_vocabulary_for_all_inputs_is_read(tmp_path: Path) -> None:
    old = Shape("tokens", 4, 3, SPECS, (1000, 1000)).build().eval()
    told = {**old.shape.as_json(), "words": 1000}
    save_checkpoint(tmp_path / "old", module_tensors({"part": old}), {"shape": told})
    queries = [torch.from_numpy(array) for array in batch()]
    with torch.inference_mode():
        assert torch.equal(load_part(tmp_path / "old")(*queries), old(*queries))
