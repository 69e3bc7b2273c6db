from __future__ import annotations

import copy
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import speed
from benchmarks.published import NormalisedConv2d, PublishedIResNet, unchecked_inverse
from benchmarks.timing import Arms, Sizes, interleave
from codedinvnet import stages
from codedinvnet.data import ImageSet, sample_images
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.nn.iresnet import IResNet
from codedinvnet.nn.lipschitz import constrain_exactly, constrained_layers, operator_norm
from codedinvnet.training import precision
from tests.conftest import Command, make_run, tiny_settings

EXACT, COARSE = 1e-6, 2e-4
"""The errors that the inverses are compared at (pixels in 0..1, the largest of all)."""
TINY = Sizes(
    rounds=2, plain_rounds=1, seconds=0.0, batch=8, embed_batches=(1, 4), plain_iterations=40
)


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


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the arms, and say that their turns took 2, 3, 4 ms and so on."""
    numbers = itertools.count(2)

    def timed(arms: Arms, *, rounds: int, **how: Any) -> dict[str, list[float]]:
        interleave(arms, rounds=rounds, **how)
        return {name: [float(next(numbers)) for _ in range(rounds)] for name in arms}

    monkeypatch.setattr(speed, "interleave", timed)


def check_ratio(found: dict[str, Any], name: str, times: str, slow: str, fast: str) -> None:
    expected = found[times][slow]["median"] / found[times][fast]["median"]
    assert found[name] == pytest.approx(expected, abs=1e-3), name


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


@pytest.mark.usefixtures("known_times")
def test_embed(parts: speed.SpeedBench) -> None:
    found = parts.embed()
    for tag in ("batch1", "batch4"):
        for kind, slow in {
            "": "published",
            "folded_": "published, folded",
            "unfolded_": "ours, unfolded",
        }.items():
            check_ratio(found, f"embed_ratio_{kind}{tag}", f"embed_ms_{tag}", slow, "ours, served")
        low, high = found[f"embed_ratio_{tag}_spread"]
        assert low <= high
        assert set(found[f"embed_ms_{tag}"]) == {
            "published",
            "published, folded",
            "ours, unfolded",
            "ours, served",
        }
        assert max(found[f"embed_difference_{tag}"].values()) < 1e-5


@pytest.mark.usefixtures("known_times")
def test_inverse(parts: speed.SpeedBench) -> None:
    found = parts.inverse()
    error = found["inverse_error"]
    assert max(error["plain"], error["exact"]) < 1e-5
    assert max(error["plain, float64"], error["exact, float64"]) <= EXACT
    assert error["exact"] < error["coarse"] <= COARSE
    assert set(found["inverse_ms"]) == set(error)
    assert 1 < found["inverse_iterations"]["coarse"] < found["inverse_iterations"]["exact"] < 40
    for kind, (slow, fast) in {
        "plain": ("plain", "exact"),
        "plain_float64": ("plain, float64", "exact, float64"),
        "ten": ("ten", "coarse"),
        "ten_served": ("ten_served", "coarse"),
    }.items():
        check_ratio(found, f"inverse_ratio_{kind}", "inverse_ms", slow, fast)


@pytest.mark.usefixtures("known_times", "bfloat16_instructions")
def test_train(parts: speed.SpeedBench) -> None:
    found = parts.train()
    first, last = found["train_first_loss"], found["train_last_loss"]
    assert set(first) == {"plain", "ours", "plain, bfloat16", "ours, bfloat16"}
    assert all(loss == pytest.approx(first["ours"], rel=0.02) for loss in first.values())
    assert first["ours, bfloat16"] != first["ours"]
    assert all(last[name] != loss for name, loss in first.items())
    assert found["train_batch"] == TINY.batch
    for kind, slow, fast in (
        ("", "plain", "ours"),
        ("_both_bfloat16", "plain, bfloat16", "ours, bfloat16"),
        ("_bfloat16", "plain", "ours, bfloat16"),
    ):
        check_ratio(found, f"train_ratio{kind}", "train_ms", slow, fast)


def test_train_without_instructions_for_bfloat16(
    parts: speed.SpeedBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: False)
    found = parts.train()
    assert set(found["train_ms"]) == {"plain", "ours"}
    assert {key for key in found if "ratio" in key} == {"train_ratio", "train_ratio_spread"}


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
    x = bench.images(64)

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


def test_commands(
    call_benchmarks: Command,
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bfloat16_instructions: None,
) -> None:
    monkeypatch.setattr(speed, "QUICK", replace(TINY, plain_iterations=5))
    out = tmp_path / "speed.json"
    reports = []
    for part in speed.PARTS:
        outcome = call_benchmarks(part, bundle_folder, "--quick", "--json", "--out", out)
        assert outcome.code == 0, outcome.err
        reports.append(json.loads(outcome.out))
        assert set(reports[-1]["parts"]) == {part}
    merged = json.loads(out.read_text())
    assert set(merged["parts"]) == set(speed.PARTS)
    assert {"machine", "cores", "device", "schema_version", "bundle"} <= merged.keys()
    assert all(merged[key] == value for r in reports for key, value in r.items() if key != "parts")
    ratios = {key for key in merged if "_ratio" in key and not key.endswith("spread")}
    wanted = {
        "inverse_ratio_plain",
        "inverse_ratio_ten",
        "embed_ratio_batch1",
        "embed_ratio_batch4",
        "train_ratio",
        "train_ratio_bfloat16",
    }
    assert wanted <= ratios
    assert all(f"{key}_spread" in merged for key in ratios)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: speed.SpeedBench) -> dict[str, Any]:
        raise AssertionError("nothing is measured")

    for part in speed.PARTS:
        monkeypatch.setattr(speed.SpeedBench, part, nothing)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("place", "said"),
    [(".", "it is a folder"), ("file/speed.json", "is no folder"), ("new/speed.json", None)],
)
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    place: str, said: str | None, bundle_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    refused = UserError if said else AssertionError
    with pytest.raises(refused, match=said or "nothing is measured"):
        speed.run("embed", str(bundle_folder), sizes=TINY, out=tmp_path / place)


@pytest.mark.usefixtures("unmeasured")
def test_a_report_into_a_locked_folder_is_refused(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(UserError, match=f"nothing may be written into {tmp_path}"):
        speed.run("embed", str(bundle_folder), sizes=TINY, out=tmp_path / "new" / "speed.json")


def test_a_report_of_other_weights_is_refused_before_anything_is_measured(
    bundle_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "speed.json"
    report = speed.run("embed", str(bundle_folder), sizes=TINY, out=out)
    assert json.loads(out.read_text()) == report
    out.write_text(json.dumps({**report, "weights": "others"}))
    request.getfixturevalue("unmeasured")
    with pytest.raises(UserError, match=r"speed.json holds parts .* \(weights 'others' -> "):
        speed.run("train", str(bundle_folder), sizes=TINY, out=out)


def test_table_for_people(
    call_benchmarks: Command, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "QUICK", TINY)
    outcome = call_benchmarks("embed", bundle_folder, "--quick")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    rows = [line for line in lines if line.startswith("  ours, served")]
    assert [len(row.removeprefix("  ours, served").split()) for row in rows] == [4, 4]
    assert any(line.startswith("embed_ratio_batch1 ") for line in lines)


def test_an_irevnet_is_refused(tmp_path: Path, data_dir: Path) -> None:
    run = make_run(tiny_settings("recovery", "irevnet"), tmp_path, data_dir)
    stages.train(run)
    stages.fuse(run, 4)
    with pytest.raises(UserError, match="no i-ResNet with a bound"):
        speed.run("embed", str(run.fusion_folder(4) / "bundle"), quick=True)
