"""`python -m benchmarks inverse|embed|train`: how fast the i-ResNet is, beside the published way.

Errors are measured on what the timed calls returned. `python -m benchmarks engine` is run from
here, too.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from benchmarks.engine import compare
from benchmarks.published import PublishedIResNet, unchecked_inverse
from benchmarks.reports import check_mergeable, part_of_report, save
from benchmarks.timing import FULL, QUICK, Arms, Sizes, interleave, ratio, summary
from codedinvnet.data import ImageSource
from codedinvnet.devices import first_tensor
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import Bundle, load_bundle, weights_digest
from codedinvnet.models.coded import build_network
from codedinvnet.nn.iresnet import IResNet, IResNetBlock
from codedinvnet.nn.lipschitz import project
from codedinvnet.provenance import describe_machine
from codedinvnet.stages import evaluation_images
from codedinvnet.training import precision
from codedinvnet.training.network import NetworkStage

SCHEMA = 1
EXACT_TOLERANCE, COARSE_TOLERANCE = 1e-6, 2e-4
"""Of a block's residual: the largest error of a pixel in 0..1 is about the same."""


def unfolded(bundle: Bundle) -> IResNet:
    """Return a network with constrained convolutions and a bundle's weights, in evaluation mode.

    Raises:
        UserError: if the bundle's network is no i-ResNet with a bound.
    """
    info, device = bundle.info.model, first_tensor(bundle.model).device
    network = build_network(info.network, bundle.model.input_shape)
    if not isinstance(network, IResNet) or network.coefficient is None:
        raise UserError(
            f"bundle {bundle.info.name!r} has no i-ResNet with a bound: no constraint to fold, no "
            "iteration to invert it by, so there is nothing to compare"
        )
    state = network.state_dict()  # the power iteration's vectors are not in a bundle
    network.load_state_dict({**state, **bundle.model.network.state_dict()})
    project(network, iterations=50)
    return network.to(device).eval().requires_grad_(False)


class SpeedBench:
    """The comparisons; each returns its figures.

    Args:
        bundle: whose network is measured.
        source: images to embed.
        sizes: how much is measured.
    """

    def __init__(self, bundle: Bundle, source: ImageSource, sizes: Sizes) -> None:
        self.bundle, self.source, self.sizes = bundle, source, sizes
        self.served = cast(IResNet, bundle.model.network)
        self.device = first_tensor(bundle.model).device
        self.unfolded = unfolded(bundle)
        self.published = PublishedIResNet(self.unfolded).to(self.device).eval()
        self.published.requires_grad_(False)
        self.folded = self.published.folded()

    def images(self, count: int) -> Tensor:
        """Return the first images (B, C, H, W) as the network takes them, over again if need be."""
        rows = torch.arange(count) % len(self.source)
        return self.bundle.model.prepare(self.source.batch(rows)[0].to(self.device))

    # Parts

    @torch.inference_mode()
    def embed(self) -> dict[str, Any]:
        """Compare the served network with the published one, that one folded, and ours unfolded."""
        arms: dict[str, Callable[[Tensor], Tensor]] = {
            "published": self.published,
            "published, folded": self.folded,
            "ours, unfolded": self.unfolded,
            "ours, served": self.served,
        }
        report: dict[str, Any] = {}
        for batch in self.sizes.embed_batches:
            x = self.images(batch)
            calls = {name: partial(network, x) for name, network in arms.items()}
            times = interleave(
                calls,
                rounds=self.sizes.rounds,
                seconds=self.sizes.seconds,
                device=self.device,
                label=f"embed {batch}",
            )
            expected = self.unfolded(x)
            tag = f"batch{batch}"
            for key, slow in {
                "": "published",
                "folded_": "published, folded",
                "unfolded_": "ours, unfolded",
            }.items():
                report |= ratio(f"embed_ratio_{key}{tag}", times, slow, "ours, served")
            report[f"embed_ms_{tag}"] = {name: summary(values) for name, values in times.items()}
            report[f"embed_difference_{tag}"] = {
                name: float((call() - expected).abs().max()) for name, call in calls.items()
            }
        return report

    @torch.inference_mode()
    def inverse(self) -> dict[str, Any]:
        """Compare the checked inverse with a hundred and with ten unchecked iterations.

        Every arm inverts the latents that its own network gives the same images.
        """
        sizes, served = self.sizes, self.served
        x = self.images(sizes.batch)
        latents: dict[PublishedIResNet | IResNet, Tensor] = {
            network: network(x) for network in (self.published, self.folded, served)
        }
        found: dict[str, Tensor] = {}

        def unchecked(name: str, network: PublishedIResNet | IResNet, count: int) -> Arms:
            z = latents[network]

            def call() -> None:
                found[name] = unchecked_inverse(network, z, count)

            return {name: call}

        def checked(name: str, network: IResNet, tolerance: float) -> Arms:
            def call() -> None:
                found[name] = network.inverse(latents[network], tolerance=tolerance)

            return {name: call}

        # In float32 no inverse of these latents comes nearer than their own rounding, about 1.5e-6
        # for the shipped network: the error is reached in float64, and both ratios are given.
        published, wide = copy.deepcopy(self.published).double(), copy.deepcopy(served).double()
        latents |= {network: network(x.double()) for network in (published, wide)}
        plain = interleave(
            {
                **unchecked("plain", self.published, sizes.plain_iterations),
                **checked("exact", served, EXACT_TOLERANCE),
                **unchecked("plain, float64", published, sizes.plain_iterations),
                **checked("exact, float64", wide, EXACT_TOLERANCE),
            },
            rounds=sizes.plain_rounds,
            seconds=sizes.seconds,
            device=self.device,
            label="inverse, exact",
        )
        iterations = {"exact": self.iterations()}
        ten = interleave(
            {
                **unchecked("ten", self.folded, 10),
                **unchecked("ten_served", served, 10),
                **checked("coarse", served, COARSE_TOLERANCE),
            },
            rounds=sizes.rounds,
            seconds=sizes.seconds,
            device=self.device,
            label="inverse, coarse",
        )
        iterations["coarse"] = self.iterations()
        times = {**plain, **ten}
        return {
            **ratio("inverse_ratio_plain", times, "plain", "exact"),
            **ratio("inverse_ratio_plain_float64", times, "plain, float64", "exact, float64"),
            **ratio("inverse_ratio_ten", times, "ten", "coarse"),
            **ratio("inverse_ratio_ten_served", times, "ten_served", "coarse"),
            "inverse_batch": sizes.batch,
            "inverse_plain_iterations": sizes.plain_iterations,
            "inverse_tolerance": {"exact": EXACT_TOLERANCE, "coarse": COARSE_TOLERANCE},
            "inverse_iterations": iterations,
            "inverse_error": {name: float((back - x).abs().max()) for name, back in found.items()},
            "inverse_ms": {name: summary(values) for name, values in times.items()},
        }

    def iterations(self) -> float:
        """Return the iterations of the last inverse: the slowest sample's, mean over blocks."""
        blocks = [step for step in self.served.steps() if isinstance(step, IResNetBlock)]
        return round(statistics.mean(block.iterations for block in blocks), 2)

    def train(self) -> dict[str, Any]:
        """Compare a training step with one that recomputes all norms in the forward pass.

        All are the step of the network's training stage, for the classification alone, on batches
        of this benchmark's size. They differ in the network (the published one has nothing to
        project) and the precision; bfloat16 is left out where the device has no instructions for
        it.
        """
        names = ["plain", "ours"]
        reduced = precision.computes_bfloat16(self.device.type)
        if reduced:
            names += [f"{name}, bfloat16" for name in names]
        stages = {
            name: self.stage(published=name.startswith("plain"), reduced=name.endswith("bfloat16"))
            for name in names
        }
        losses: dict[str, list[float]] = {name: [] for name in stages}

        def arm(name: str, stage: NetworkStage) -> Callable[[], None]:
            def call() -> None:
                done = len(losses[name])
                losses[name].append(stage.step(0, done % stage.steps_per_epoch)["loss"])

            return call

        times = interleave(
            {name: arm(name, stage) for name, stage in stages.items()},
            rounds=self.sizes.rounds,
            seconds=self.sizes.seconds,
            device=self.device,
            label="train",
        )
        found = ratio("train_ratio", times, "plain", "ours")
        if reduced:
            found |= ratio("train_ratio_both_bfloat16", times, "plain, bfloat16", "ours, bfloat16")
            found |= ratio("train_ratio_bfloat16", times, "plain", "ours, bfloat16")
        return {
            **found,
            "train_batch": self.sizes.batch,
            "train_ms": {name: summary(values) for name, values in times.items()},
            "train_first_loss": {name: values[0] for name, values in losses.items()},
            "train_last_loss": {name: values[-1] for name, values in losses.items()},
        }

    def stage(self, *, published: bool = False, reduced: bool = False) -> NetworkStage:
        """Return the training stage of the bundle's settings on these images, initialised.

        Args:
            published: with the published network, of the same weights.
            reduced: passes through f in bfloat16, else in float32.
        """
        settings = self.bundle.info.provenance.settings
        options = settings.training.model_copy(
            update={
                "objective": "classification",
                "batch_size": self.sizes.batch,
                "precision": "bfloat16" if reduced else "float32",
            }
        )
        data = settings.data.model_copy(update={"validation": len(self.source) // 10})
        changed = settings.model_copy(update={"training": options, "data": data})
        stage = NetworkStage(changed, self.source, self.device)
        stage.network.train()
        stage.start_epoch(0, torch.Generator().manual_seed(0))
        if published:
            network = PublishedIResNet(cast(IResNet, stage.network)).to(self.device)
            stage.network = cast(IResNet, network)
            stage.optimizer = torch.optim.AdamW(
                [*network.parameters(), *stage.head.parameters()],
                lr=options.learning_rate,
                weight_decay=options.weight_decay,
            )
        return stage


ENGINE = "engine"
PARTS = ("inverse", "embed", "train")


def run(
    part: str,
    name: str,
    *,
    quick: bool = False,
    data_dir: Path | None = None,
    device: torch.device | str = "cpu",
    sizes: Sizes | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Run one comparison.

    Args:
        part: one of PARTS, or ENGINE.
        name: of a shipped bundle, or a folder.
        quick: a shorter version, whose figures are rough.
        data_dir: where the image sets lie; None takes the images in the package. Engines need none.
        device: that the networks are on.
        sizes: how much is measured; None chooses by `quick`.
        out: where the report is written, beside other parts that were measured likewise.

    Returns:
        One report: the figures, and what they were measured with.

    Raises:
        UserError: before anything is measured, if the bundle cannot be loaded, has no i-ResNet (or,
            of engines, ONNX Runtime is not installed), or does not take the images, or if `out`
            cannot be written or holds parts of another bundle or machine.
    """
    bundle = load_bundle(name, device)
    sizes = sizes or (QUICK if quick else FULL)
    images: dict[str, int] = {}
    if part == ENGINE:
        torch.set_num_threads(1)  # as a worker has
        measure = partial(compare, bundle, name, sizes)
    else:
        source = evaluation_images(bundle, "test" if data_dir else "sample", data_dir)
        measure = getattr(SpeedBench(bundle, source, sizes), part)
        images["images"] = len(source)
    report: dict[str, Any] = {
        "schema_version": SCHEMA,
        "bundle": name,
        "weights": weights_digest(name),
        **images,
        "quick": quick,
        "device": str(torch.device(device)),
        "machine": describe_machine(),
        "cores": os.cpu_count(),
    }
    if out is not None:
        check_mergeable(report, out)
    began = time.strftime("%Y-%m-%dT%H:%M:%S")
    found = measure()
    report |= found | {"parts": {part: part_of_report(found, began)}}
    if out is not None:
        save(report, out)
    return report


class Aim(NamedTuple):
    """How many times faster something should be."""

    ratio: str
    """A key of a report."""
    least: float
    what: str


AIMS = (
    Aim("inverse_ratio_plain_float64", 4.0, "inverse to 1e-6 over a hundred iterations, float64"),
    Aim("inverse_ratio_plain", 4.0, "the same in float32, to the smallest error that it allows"),
    Aim("inverse_ratio_ten", 1.5, "inverse to 2e-4 over ten iterations of the folded network"),
    Aim("embed_ratio_batch1", 1.8, "embedding of one image over the published network"),
    Aim("embed_ratio_batch128", 1.8, "embedding of 128 images over the published network"),
    Aim("train_ratio", 1.3, "training step over one with all norms in the forward pass"),
)
AIM_COLUMNS = ("times faster", "aim", "measured", "over the rounds")


def aims(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of what was aimed at and measured, of what the report has."""
    return [
        (
            aim.what,
            f"{aim.least:g}",
            f"{report[aim.ratio]:.2f}",
            " to ".join(f"{bound:.2f}" for bound in report[f"{aim.ratio}_spread"]),
        )
        for aim in AIMS
        if aim.ratio in report
    ]


def table(report: Mapping[str, Any]) -> str:
    """Return a report as text: a row for each arm, then the ratios."""
    lines = []
    for key, arms in report.items():
        stem, found, tag = key.partition("_ms")
        if not found:
            continue
        errors = report.get(f"{stem}_error", report.get(f"{stem}_difference{tag}", {}))
        title = " ".join([stem, *tag.split("_")]).strip()
        lines.append(
            f"{title:<28}{'ms':>10}{'min':>10}{'max':>10}{'largest error' if errors else '':>16}"
        )
        for name, times in arms.items():
            error = f"{errors[name]:.1e}" if name in errors else ""
            cells = "".join(f"{times[column]:>10.3f}" for column in ("median", "min", "max"))
            lines.append(f"  {name:<26}{cells}{error:>16}".rstrip())
        lines.append("")
    for key, value in report.items():
        if f"{key}_spread" in report:
            low, high = report[f"{key}_spread"]
            lines.append(f"{key:<28}{value:>10.2f}   ({low:.2f} to {high:.2f} over the rounds)")
    lines += ["", f"{report['bundle']}, {report['machine']}, {report['cores']} cores"]
    return "\n".join(lines)
