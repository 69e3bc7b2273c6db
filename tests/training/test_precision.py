from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from codedinvnet.training import precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is known of this processor, neither before a test nor behind it."""
    forget: list[Callable[[], None]] = [
        precision.judge_bfloat16.cache_clear,
        precision.computes_bfloat16.cache_clear,
        precision._tell.cache_clear,
    ]
    for clear in forget:
        clear()
    yield
    for clear in forget:
        clear()


def timed(monkeypatch: pytest.MonkeyPatch, *shares: float) -> list[torch.dtype]:
    """Have bfloat16 take these shares of float32's time, turn by turn; return what is timed."""
    asked: list[torch.dtype] = []

    def seconds(dtype: torch.dtype) -> float:
        asked.append(dtype)
        return shares[asked.count(dtype) - 1] if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(precision, "step_seconds", seconds)
    return asked


@pytest.mark.parametrize(
    ("asked", "native", "share", "computed"),
    [
        ("float32", True, 0.6, torch.float32),
        ("float32", False, 0.6, torch.float32),
        ("bfloat16", True, 0.6, torch.bfloat16),
        ("bfloat16", True, 0.95, torch.float32),  # not clearly faster
        ("bfloat16", True, 1.36, torch.float32),
        ("bfloat16", False, 0.6, torch.float32),
    ],
)
def test_passes_are_reduced_only_where_that_is_faster(
    asked: str, native: bool, share: float, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: native)
    timed(monkeypatch, *[share] * 4)
    with precision.autocast(asked, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == computed


@pytest.mark.parametrize(
    ("native", "share", "told"),
    [
        (False, 0.6, "this cpu has no instructions for bfloat16: training in float32 instead\n"),
        (
            True,
            1.36,
            "bfloat16 takes 1.36 of float32's time on this cpu: training in float32 instead\n",
        ),
        (True, 0.62, "bfloat16 takes 0.62 of float32's time on this cpu: training in bfloat16\n"),
    ],
)
def test_one_line_says_what_was_chosen_and_why(
    native: bool,
    share: float,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: native)
    timed(monkeypatch, *[share] * 4)
    for asked in ("float32", "bfloat16", "bfloat16"):
        precision.autocast(asked, CPU)
    assert capsys.readouterr().err == told


def test_nothing_is_timed_unless_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, *[0.6] * 4)
    precision.autocast("float32", CPU)
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: False)
    precision.autocast("bfloat16", CPU)
    precision.judge_bfloat16.cache_clear()
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: True)
    assert precision.judge_bfloat16("cuda") == (True, "")
    assert asked == []


@pytest.mark.parametrize(
    ("shares", "faster"),
    [
        ([0.1, 1.4, 1.5, 1.6], False),  # the first turn loads what the others have at hand
        ([5.0, 0.6, 3.0, 9.0], True),
    ],
)
def test_the_shortest_turn_decides_once_a_process(
    shares: list[float], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: True)
    asked = timed(monkeypatch, *shares)
    assert precision.judge_bfloat16("cpu").faster is faster
    precision.judge_bfloat16("cpu")
    assert asked == [torch.float32, torch.bfloat16] * 4


def test_timing_is_short_and_leaves_the_random_numbers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: True)
    before, began = torch.get_rng_state(), time.process_time()
    with torch.no_grad():
        assert precision.judge_bfloat16("cpu").why.startswith("bfloat16 takes ")
    assert time.process_time() - began < 10
    assert torch.equal(torch.get_rng_state(), before)


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
    assert precision.computes_bfloat16("cpu") is native


def test_an_older_pytorch_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision.computes_bfloat16("cpu")
