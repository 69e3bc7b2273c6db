"""A small backup's features beside the decoded latent, in one head."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from codedinvnet.codes.equal_cost import count_macs, macs, served_macs
from codedinvnet.codes.joined import BackupAndCode, answer_all
from codedinvnet.codes.mean import MeanCode
from codedinvnet.codes.method import Given, given_by
from codedinvnet.codes.registry import find_method
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import Bundle

K = 4


@pytest.fixture
def given(bundle: Bundle) -> Given:
    torch.manual_seed(0)
    method, found = BackupAndCode(), given_by(bundle, K)
    part = method.untrained(found, method.made_with(found, None)).eval()
    return given_by(bundle, K, part=part)


def group(size: int) -> torch.Tensor:
    return torch.rand(3, size, 1, 28, 28, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", range(1, K + 1))
def test_every_erasure_pattern_has_an_answer(given: Given, size: int) -> None:
    """One missing member's by both, several ones' by the backup's features alone."""
    scheme, images = BackupAndCode().build(given), group(size)
    assert isinstance(scheme.code, MeanCode)
    model = scheme.code.model
    tasks = scheme.rules.tasks(size)
    outputs = {t: scheme.compute(t, images[:, list(s.members)]).output for t, s in tasks.items()}
    with torch.inference_mode():
        both, alone = answer_all(model, images)
        direct = given.classifier(images.flatten(0, 1)).unflatten(0, (3, size))
    for count in range(size + 2):
        for lost in combinations(outputs, count):
            rest = {t: output for t, output in outputs.items() if t not in lost}
            missing = [i for i in lost if i < size]
            answers = scheme.decode(rest, size)
            assert set(answers) == set(range(size)) - (set(missing) if K in lost else set())
            for i, found in answers.items():
                made_up = both if len(missing) == 1 else alone
                expected = (made_up if i in missing else direct)[:, i]
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_width_does_not_depend_on_where_f_is(given: Given) -> None:
    """A network of the meta device takes no image of another one's, as one of a GPU does not."""
    elsewhere = copy.deepcopy(given.coded).to("meta")
    method = BackupAndCode()
    found = method.made_with(replace(given, model=elsewhere), None)
    assert found == method.made_with(given, None)


def test_f_and_the_backup_together_cost_what_they_may(given: Given) -> None:
    model = given.coded
    for name, cost in (("backup-and-code", 1.4), ("backup-and-code@2", 2.0)):
        method = find_method(name)
        width = method.made_with(given, None)["width"]

        def spent(width: int, method: BackupAndCode) -> int:
            part = method.untrained(given, {"width": width}).eval()
            padded = torch.zeros(1, K, *model.input_shape)
            encode = count_macs(lambda: part["encoder"](padded))  # type: ignore[index]
            return encode + macs(model.network, model)

        assert isinstance(method, BackupAndCode)
        assert spent(width, method) <= cost * served_macs(model) < spent(width + 1, method)
    with pytest.raises(UserError, match="backup-and-code@1: f alone costs 1, so that nothing"):
        find_method("backup-and-code@1").check(K, given.shape, given.bundle)
