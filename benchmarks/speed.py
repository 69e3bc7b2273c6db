"""`python -m benchmarks inverse|embed|train|engine`: how fast networks are, beside other ways.

Errors are measured on what the timed calls return.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pandas import DataFrame
from torch import Tensor

from benchmarks.published import PublishedIResNet, unchecked_inverse
from benchmarks.timing import FULL, QUICK, Arms, Sizes, comparison, interleave
from codedinvnet.bench import tables
from codedinvnet.data import ImageSource
from codedinvnet.devices import first_tensor
from codedinvnet.errors import UserError
from codedinvnet.files import check_writable
from codedinvnet.models.bundle import Bundle, load_bundle, weights_digest
from codedinvnet.models.coded import build_network
from codedinvnet.models.runtime import ONNX_RUNTIME, PYTORCH, check_engine, check_installed
from codedinvnet.nn.iresnet import IResNet
from codedinvnet.nn.lipschitz import project
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.rows import SCHEMA_VERSION, append_row, read_rows
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers.computing import BundleSpec
from codedinvnet.serving.workers.result import OUTPUT
from codedinvnet.stages import evaluation_images
from codedinvnet.training import precision
from codedinvnet.training.network import NetworkStage

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

    def timed(self, arms: Arms, label: str) -> dict[str, list[float]]:
        """Time arms in turn."""
        sizes = self.sizes
        return interleave(
            arms, rounds=sizes.rounds, seconds=sizes.seconds, device=self.device, label=label
        )

    @torch.inference_mode()
    def embed(self) -> list[dict[str, Any]]:
        """Compare the served network with the published one, that one folded, and ours unfolded."""
        arms: dict[str, Callable[[Tensor], Tensor]] = {
            "published": self.published,
            "published, folded": self.folded,
            "ours, unfolded": self.unfolded,
            "ours, served": self.served,
        }
        found = []
        for batch in self.sizes.embed_batches:
            x = self.images(batch)
            calls = {name: partial(network, x) for name, network in arms.items()}
            what = f"embed {batch}"
            times, expected = self.timed(calls, what), self.unfolded(x)
            errors = {name: float((call() - expected).abs().max()) for name, call in calls.items()}
            found.append(comparison(what, times, "ours, served", errors, {"published": 1.8}))
        return found

    @torch.inference_mode()
    def inverse(self) -> list[dict[str, Any]]:
        """Compare the checked inverse with a hundred and with ten unchecked iterations.

        Every arm inverts the latents that its own network gives the same images. In float32 no
        inverse comes nearer than their own rounding, so that the smallest error is compared in
        float64, too.
        """
        sizes, served, x = self.sizes, self.served, self.images(self.sizes.batch)
        wide = (copy.deepcopy(self.published).double(), copy.deepcopy(served).double())
        pairs = {"": (self.published, served, x), ", float64": (*wide, x.double())}
        found = []
        for words, (published, ours, images) in pairs.items():
            plain = partial(unchecked_inverse, published, published(images), sizes.plain_iterations)
            exact = partial(ours.inverse, ours(images), tolerance=EXACT_TOLERANCE)
            arms = {"plain": plain, "exact": exact}
            found.append(self._inverted(f"inverse to 1e-6{words}", arms, x, "exact", {"plain": 4}))
        arms = {
            "ten": partial(unchecked_inverse, self.folded, self.folded(x), 10),
            "ten, served": partial(unchecked_inverse, served, served(x), 10),
            "coarse": partial(served.inverse, served(x), tolerance=COARSE_TOLERANCE),
        }
        found.append(self._inverted("inverse to 2e-4", arms, x, "coarse", {"ten": 1.5}))
        return found

    def _inverted(
        self,
        what: str,
        arms: Mapping[str, Callable[[], Tensor]],
        x: Tensor,
        fast: str,
        aims: Mapping[str, float],
    ) -> dict[str, Any]:
        times = self.timed(arms, what)
        errors = {name: float((call() - x).abs().max()) for name, call in arms.items()}
        return comparison(what, times, fast, errors, aims)

    def train(self) -> list[dict[str, Any]]:
        """Compare a training step with one that recomputes all norms in the forward pass.

        All are the step of the network's training stage, for the classification alone, on batches
        of this benchmark's size. They differ in the network (the published one has nothing to
        project) and the precision; bfloat16 is left out where the device has no instructions for
        it.
        """
        names = ["plain", "ours"]
        if precision.computes_bfloat16(self.device.type):
            names += [f"{name}, bfloat16" for name in names]
        stages = {
            name: self.stage(published=name.startswith("plain"), reduced=name.endswith("bfloat16"))
            for name in names
        }
        done = dict.fromkeys(stages, 0)

        def step(name: str) -> None:
            stage = stages[name]
            stage.step(0, done[name] % stage.steps_per_epoch)
            done[name] += 1

        times = self.timed({name: partial(step, name) for name in stages}, "train")
        found = [comparison("train", {n: times[n] for n in names[:2]}, "ours", {}, {"plain": 1.3})]
        if len(names) > 2:
            found.append(comparison("train, bfloat16", times, names[-1]))
        return found

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


def engine(name: str, bundle: Bundle, sizes: Sizes) -> list[dict[str, Any]]:
    """Time a query's task and a full group's parity, of noise, by PyTorch and ONNX Runtime.

    Raises:
        UserError: if ONNX Runtime is not installed, or the bundle is not on a processor.
    """
    torch.set_num_threads(1)  # as a worker has
    device = first_tensor(bundle.model).device
    check_engine(ONNX_RUNTIME, str(device))
    check_installed(ONNX_RUNTIME)
    k = bundle.info.group_sizes[-1]
    computers = {
        arm: BundleSpec(name, k, threads=1, engine=kind).load()
        for arm, kind in (("PyTorch", PYTORCH), ("ONNX Runtime", ONNX_RUNTIME))
    }
    generator = torch.Generator().manual_seed(0)
    shape = (k, *bundle.info.input.shape)
    group = torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()
    found = []
    for what, number, images in (("a query", 0, group[:1]), (f"the parity of {k}", k, group)):
        calls = {
            arm: partial(one.compute, number, {IMAGES: images}) for arm, one in computers.items()
        }
        times = interleave(
            calls, rounds=sizes.rounds, seconds=sizes.seconds, device=device, label=what
        )
        outputs = {arm: call()[0][OUTPUT] for arm, call in calls.items()}
        errors = {
            arm: float(np.abs(output - outputs["PyTorch"]).max()) for arm, output in outputs.items()
        }
        found.append(comparison(what, times, "ONNX Runtime", errors))
    return found


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
) -> list[dict[str, Any]]:
    """Run one part, and return its comparisons as rows.

    Args:
        part: one of PARTS, or ENGINE.
        name: of a shipped bundle, or a folder.
        quick: a shorter version, whose figures are rough.
        data_dir: where the image sets lie; None takes the images in the package. Engines need none.
        device: that the networks are on.
        sizes: how much is measured; None chooses by `quick`.
        out: where the rows are appended.

    Raises:
        UserError: before anything is measured, if the bundle cannot be loaded, has no i-ResNet (or,
            of engines, ONNX Runtime is not installed), or does not take the images, or if `out`
            cannot be written.
    """
    bundle = load_bundle(name, device)
    sizes = sizes or (QUICK if quick else FULL)
    if out is not None:
        check_writable(out)
        read_rows(out)
    if part == ENGINE:
        measure = partial(engine, name, bundle, sizes)
    else:
        source = evaluation_images(bundle, "test" if data_dir else "sample", data_dir)
        measure = getattr(SpeedBench(bundle, source, sizes), part)
    header = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": "speed",
        "part": part,
        "bundle": name,
        "weights": weights_digest(name),
        "quick": quick,
        "device": str(torch.device(device)),
        "machine": describe_machine(),
        "cores": os.cpu_count(),
        "commit": describe_commit(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    rows = [{**header, **found} for found in measure()]
    if out is not None:
        for row in rows:
            append_row(out, row)
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the Markdown table of rows: a line an arm, of comparisons of one kind the last row.

    The column "times faster" says how many times as fast the last arm of a comparison is.
    """
    newest = {(row["bundle"], row["what"], row["device"]): row for row in rows}
    lines = []
    for (bundle, what, device), row in newest.items():
        where = bundle if device == "cpu" else f"{bundle}, {device}"
        for arm, ms in row["ms"].items():
            found = row["faster"].get(arm, {})
            spread = "{:.2f} to {:.2f}".format(*found["rounds"]) if found else None
            values = (where, what, arm, ms, row["errors"].get(arm), found.get("times"), spread)
            lines.append((*values, found.get("aim")))
    columns = ("bundle", "what", "arm", "ms", "largest error", "times faster", "over the rounds")
    formats = {"ms": ".3f", "largest error": ".1e", "times faster": ".2f", "aim": "g"}
    frame = DataFrame(lines, columns=[*columns, "aim"])
    return tables.markdown(frame.dropna(axis="columns", how="all"), formats)
