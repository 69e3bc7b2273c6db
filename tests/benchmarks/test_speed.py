from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import speed
from benchmarks.published import NormalisedConv2d, PublishedIResNet, unchecked_inverse
from benchmarks.timing import Sizes
from codedinvnet import stages
from codedinvnet.data import ImageSet, sample_images
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.nn.iresnet import IResNet
from codedinvnet.nn.lipschitz import constrain_exactly, constrained_layers, operator_norm
from codedinvnet.rows import read_rows
from codedinvnet.training import precision
from tests.conftest import Command, make_run, tiny_settings

EXACT, COARSE = 1e-6, 2e-4
"""The errors that the inverses are compared at (pixels in 0..1, the largest of all)."""
TINY = Sizes(rounds=2, seconds=0.0, batch=8, embed_batches=(1, 4), plain_iterations=40)


def network() -> IResNet:
    torch.manual_seed(0)
    made = IResNet((1, 8, 8), blocks=(1, 2), strides=(1, 2), hidden=(6, 5), coefficient=0.8)
    with torch.no_grad():
        for layer in constrained_layers(made):
            layer.weight.mul_(5.0)
    constrain_exactly(made)
    return made.eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def parts(bundle: Bundle, held_out: ImageSet) -> speed.SpeedBench:
    return speed.SpeedBench(bundle, held_out, TINY)


@pytest.mark.parametrize("training", [False, True])
def test_published_network_computes_what_ours_does(training: bool) -> None:
    net, x = network(), noise(3, 1, 8, 8)
    published = PublishedIResNet(net).train(training)
    torch.testing.assert_close(published(x), net(x), rtol=0.0, atol=1e-5)
    assert sum(isinstance(m, NormalisedConv2d) for m in published.modules()) == 9
    plain = published.folded()
    torch.testing.assert_close(plain(x), net(x), rtol=0.0, atol=1e-5)
    assert not any(isinstance(m, NormalisedConv2d) for m in plain.modules())
    assert not list(plain.buffers())


@pytest.mark.parametrize("kernel", [3, 1])
def test_published_convolution_keeps_its_bound_and_its_raw_weight(kernel: int) -> None:
    torch.manual_seed(0)
    raw = torch.nn.Conv2d(3, 4, kernel, padding=kernel // 2)
    size = (5, 4) if kernel > 1 else (1, 1)
    with torch.no_grad():
        raw.weight.mul_(3.0 / operator_norm(raw, size))
    conv = NormalisedConv2d(raw, (5, 4), 0.8).train()
    assert torch.equal(conv.weight, raw.weight)
    for _ in range(2000):
        conv.power_step()
    assert operator_norm(conv.folded(), size) == pytest.approx(0.8, rel=1e-4)
    x = noise(2, 3, 5, 4)
    torch.testing.assert_close(
        conv(x) - conv(0 * x), 0.8 / 3 * (raw(x) - raw(0 * x)), rtol=1e-4, atol=1e-5
    )
    # What it computes does not depend on the weight's length, so the gradient is across it.
    (slope,) = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    cosine = torch.cosine_similarity(slope.flatten(), conv.weight.flatten(), dim=0)
    assert abs(float(cosine.detach())) < 1e-3
    assert float(slope.norm()) > 1e-2


def test_published_convolution_goes_on_with_its_vectors_only_in_training() -> None:
    conv = NormalisedConv2d(torch.nn.Conv2d(3, 4, 3, padding=1), (5, 4), 0.8)
    with torch.no_grad():
        conv.weight.copy_(conv.weight.roll(1, dims=1))  # another operator than the vectors' one
    before = conv.v.clone()
    conv.eval()(noise(1, 3, 5, 4))
    assert torch.equal(conv.v, before)
    conv.train()(noise(1, 3, 5, 4))
    assert not torch.equal(conv.v, before)
    for _ in range(100):
        conv.power_step()
    norm = torch.dot(conv.u.flatten(), conv.apply_operator(conv.v).flatten())
    assert float(norm.detach()) == pytest.approx(operator_norm(conv, (5, 4)), rel=1e-4)


def test_unchecked_inverse_approaches_the_checked_one() -> None:
    net, x = network(), noise(3, 1, 8, 8)
    for inverted in (net, PublishedIResNet(net).eval()):
        z = inverted(x)
        errors = [float((unchecked_inverse(inverted, z, n) - x).abs().max()) for n in (1, 5, 60)]
        assert errors[0] > 3 * errors[1] > 3 * errors[2]
        assert errors[2] < 1e-5


def by_what(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for row in found:
        assert row.keys() == {"what", "ms", "errors", "fast", "faster"}
        assert all(ms > 0 for ms in row["ms"].values())
        assert row["faster"].keys() == row["ms"].keys() - {row["fast"]}
        for slow, told in row["faster"].items():
            low, high = told["rounds"]
            assert low <= high
            ratio = row["ms"][slow] / row["ms"][row["fast"]]
            assert told["times"] == pytest.approx(ratio, rel=0.05, abs=6e-4)
    return {row["what"]: row for row in found}


def test_the_arms_compute_the_same(parts: speed.SpeedBench) -> None:
    embedded = by_what(parts.embed())
    assert set(embedded) == {"embed 1", "embed 4"}
    for row in embedded.values():
        assert set(row["errors"]) == {
            "published",
            "published, folded",
            "ours, unfolded",
            "ours, served",
        }
        assert max(row["errors"].values()) < 1e-5
    inverted = by_what(parts.inverse())
    exact, wide, coarse = (row["errors"] for row in inverted.values())
    assert max(exact.values()) < 1e-5
    assert max(wide.values()) <= EXACT
    assert exact["exact"] < coarse["coarse"] <= COARSE
    assert set(coarse) == {"ten", "ten, served", "coarse"}


@pytest.mark.parametrize("reduced", [True, False])
def test_training_steps_are_compared_in_each_precision(
    reduced: bool, parts: speed.SpeedBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: reduced)
    found = by_what(parts.train())
    assert set(found["train"]["ms"]) == {"plain", "ours"}
    assert ("train, bfloat16" in found) == reduced


def test_published_network_takes_its_norms_in_float32(
    parts: speed.SpeedBench, bfloat16_instructions: None
) -> None:
    stage = parts.stage(published=True, reduced=True)
    layer = next(m for m in stage.network.modules() if isinstance(m, NormalisedConv2d))
    expected = copy.deepcopy(layer)
    expected.power_step()
    stage.step(0, 0)
    assert layer.v.dtype == torch.float32
    assert torch.allclose(layer.v, expected.v, atol=1e-6)


def test_inverse_of_shipped_bundles_is_as_exact_as_promised() -> None:
    bench = speed.SpeedBench(load_bundle("mnist"), sample_images("mnist"), TINY)
    x = bench.images(16)

    def error(network: IResNet, x: Tensor, tolerance: float) -> float:
        with torch.inference_mode():
            return float((network.inverse(network(x), tolerance=tolerance) - x).abs().max())

    assert error(bench.served, x, speed.COARSE_TOLERANCE) <= COARSE
    # In float32 the latents' own rounding is left, which a hundred plain iterations leave, too.
    with torch.inference_mode():
        plain = unchecked_inverse(bench.served, bench.served(x), 100)
    limit = max(EXACT, 1.1 * float((plain - x).abs().max()))
    assert error(bench.served, x, speed.EXACT_TOLERANCE) <= limit < 2 * EXACT
    wide = copy.deepcopy(bench.served).double()
    assert error(wide, x.double(), speed.EXACT_TOLERANCE) <= EXACT


def test_each_part_appends_rows_and_prints_a_table(
    call_benchmarks: Command, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEDINVNET_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "QUICK", replace(TINY, plain_iterations=5))
    out = tmp_path / "speed.jsonl"
    for part in (*speed.PARTS, speed.ENGINE):
        outcome = call_benchmarks(part, bundle_folder, "--quick", "--out", out)
        assert outcome.code == 0, outcome.err
        assert outcome.out.startswith("| bundle | what | arm | ms |")
    rows = read_rows(out)
    assert {row["part"] for row in rows} == {*speed.PARTS, speed.ENGINE}
    for row in rows:
        assert {"machine", "cores", "device", "commit", "began", "weights"} <= row.keys()
        assert row["quick"] is True
    engines = [row for row in rows if row["part"] == speed.ENGINE]
    assert [row["what"] for row in engines] == ["a query", "the parity of 4"]
    assert all(row["errors"]["ONNX Runtime"] < 1e-4 for row in engines)
    table = speed.table([*rows, *rows])  # of comparisons of one kind the last counts
    assert table == speed.table(rows)
    assert table.count("| ours, served |") == 2


def test_what_cannot_be_written_or_computed_is_told_before_anything_is_measured(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed.SpeedBench, "embed", None)
    with pytest.raises(UserError, match="it is a folder"):
        speed.run("embed", str(bundle_folder), sizes=TINY, out=tmp_path)
    monkeypatch.setattr("codedinvnet.models.runtime.NEEDED", ("nowhere_to_be_found",))
    with pytest.raises(UserError, match="onnxruntime needs nowhere_to_be_found"):
        speed.run("engine", str(bundle_folder), sizes=TINY)


def test_an_irevnet_is_refused(tmp_path: Path, data_dir: Path) -> None:
    run = make_run(tiny_settings("recovery", "irevnet"), tmp_path, data_dir)
    stages.train(run)
    stages.fuse(run, 4)
    with pytest.raises(UserError, match="no i-ResNet with a bound"):
        speed.run("embed", str(run.fusion_folder(4) / "bundle"), quick=True)
