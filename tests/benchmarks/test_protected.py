"""The benchmarks of protected models: what they read, and what they lack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import protected, protected_serving
from tests.conftest import Command


def test_files_are_read_as_magika_reads_them(tmp_path: Path) -> None:
    def ends(content: bytes) -> np.ndarray | None:
        path = tmp_path / "file"
        path.write_bytes(content)
        return protected._ends(str(path))

    found = ends(b"  \nhello there\n\t ")
    assert found is not None
    assert found.shape == (2048,)
    assert bytes(found[:14].astype(np.uint8)) == b"hello there\n\t "
    assert (found[14:2034] == 256).all()
    assert bytes(found[2034:].astype(np.uint8)) == b"  \nhello there"
    long = bytes(range(1, 251)) * 40
    found = ends(long)
    assert found is not None
    assert bytes(found[:1024].astype(np.uint8)) == long[:1024]
    assert bytes(found[1024:].astype(np.uint8)) == long[-1024:]
    assert ends(b"short") is None
    assert ends(b" " * 100) is None
    many = tmp_path / "many"
    many.mkdir()
    for number in range(5):
        (many / f"{number % 2}.txt").write_text(f"file number {number % 2}")
    assert protected._files([many]).shape == (2, 2048)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nothing"], "invalid choice"),
        (["lite0", "--out", "x"], "a clone of github.com/thunderInfy/imagenette"),
        (["resnet56", "--out", "x"], "CIFAR-10's train.npz"),
        (["resnet56"], "--out: name a folder"),
    ],
)
def test_what_a_row_lacks_is_why(
    words: list[str],
    why: str,
    call_benchmarks: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call_benchmarks("protected", *words)
    assert outcome.code == 2
    assert why in outcome.err


def test_work_is_in_service_times_of_a_query() -> None:
    def metrics(data: int, parity: int, data_s: float, parity_s: float) -> dict[str, float]:
        found = {}
        for kind, count, seconds in (("data", data, data_s), ("parity", parity, parity_s)):
            found[f'codedinvnet_worker_seconds_sum{{task="{kind}"}}'] = seconds
            found[f'codedinvnet_worker_seconds_count{{task="{kind}"}}'] = count
            found[f'codedinvnet_tasks_total{{task="{kind}"}}'] = count
        return found

    service = protected_serving.WAIT_MS + 2  # of computing
    before, after = metrics(10, 0, 1.0, 0.0), metrics(110, 10, 1.2, 0.05)
    assert protected_serving.work(before, metrics(110, 0, 1.2, 0.0), 100, None) == 1
    after |= {'codedinvnet_groups_total{size="10"}': 5, 'codedinvnet_groups_total{size="4"}': 5}
    one = protected_serving.work(before, after, 100, protected_serving.Backup(10, 3.0, 1.0))
    assert one == pytest.approx((100 * service + 50 + 3 * 70) / (100 * service))
    # Two tasks a group, each of which takes half of its images.
    after |= metrics(110, 20, 1.2, 0.05)
    two = protected_serving.work(before, after, 100, protected_serving.Backup(10, 3.0, 0.5))
    assert two == pytest.approx(one)
