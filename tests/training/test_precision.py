from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from codedinvnet.training.precision import autocast, computes_bfloat16

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _unknown() -> Iterator[None]:
    """Nothing is known of this processor, neither before a test nor after it."""
    computes_bfloat16.cache_clear()
    yield
    computes_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("precision", "instructions", "computed"),
    [
        ("float32", {"amx_bf16": True}, torch.float32),
        ("bfloat16", {"amx_bf16": True, "avx2": False}, torch.bfloat16),
        ("bfloat16", {"amx_bf16": False, "avx2": True}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),  # PyTorch does not know them
    ],
)
def test_passes_are_in_bfloat16_where_the_processor_computes_in_it(
    precision: str,
    instructions: dict[str, bool],
    computed: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    for _ in range(2):
        with autocast(precision, CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == computed
    told = "no instructions for bfloat16: training in float32 instead"
    assert capsys.readouterr().err.count(told) == (precision == "bfloat16" != str(computed)[6:])
