from __future__ import annotations

import pytest
import torch

from codedinvnet.training import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "native", "computed"),
    [
        ("float32", True, torch.float32),
        ("float32", False, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
    ],
)
def test_passes_are_reduced_only_where_that_is_faster(
    asked: str, native: bool, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: native)
    with precision.autocast(asked, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == computed


def test_one_line_says_that_bfloat16_would_be_slower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: False)
    precision._tell.cache_clear()
    for asked in ("float32", "bfloat16", "bfloat16"):
        precision.autocast(asked, CPU)
    told = "this cpu has no instructions for bfloat16: training in float32 instead\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, False),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({"sve_bf16": True}, True),
        ({}, True),
    ],
)
def test_a_processor_is_asked(
    capabilities: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    precision.computes_bfloat16.cache_clear()
    assert precision.computes_bfloat16("cpu") is native
    precision.computes_bfloat16.cache_clear()


def test_an_older_pytorch_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    precision.computes_bfloat16.cache_clear()
    assert precision.computes_bfloat16("cpu")
    precision.computes_bfloat16.cache_clear()
