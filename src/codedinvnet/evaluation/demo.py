"""The demonstration: a table of bundles on the shipped images, and a picture of one group each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from codedinvnet.codes.build import scheme_for
from codedinvnet.data import random_groups, sample_images
from codedinvnet.data.sources import ImageSource
from codedinvnet.evaluation.accuracy import evaluate
from codedinvnet.models.bundle import Bundle, load_bundle

SIZES = (2, 4, 10)
"""Group sizes of the table."""
SHOWN = 4
"""Queries in the picture's groups."""
COLUMNS = ("normal", "recovered", "worst position", "agreement")
DIRECT, DECODED = "#bbbbbb", "#cc3311"


def run_demo(names: Sequence[str], picture: Path, seed: int = 0) -> None:
    """Evaluate bundles on the shipped test images, print a table, and draw a group of each."""
    print("Every worker erased in turn; % of the shipped 1,000 test images, 5 groupings")
    print(f"{'bundle':<9}{'k':>3}{'overhead':>10}" + "".join(f"{name:>16}" for name in COLUMNS))
    figure = Figure(figsize=(11, 2.2 * len(names)), layout="constrained")
    panels = figure.subfigures(len(names), squeeze=False)[:, 0]
    for name, panel in zip(names, panels, strict=True):
        bundle, source = load_bundle(name), sample_images(name)
        for k in SIZES:
            e = evaluate(scheme_for(bundle, k), source, k=k, seed=seed)
            shares = (
                *(e.normal_accuracy, e.recovered_accuracy),
                *(e.worst_position_accuracy, e.agreement),
            )
            cells = "".join(f"{100 * share:>16.1f}" for share in shares)
            print(f"{name:<9}{k:>3}{100 / k:>9.0f}%{cells}")
        draw_group(panel, bundle, source, seed)
    figure.savefig(picture, dpi=120)
    print(f"A group of {SHOWN} queries, one of which is lost: {picture}")


def draw_group(panel: SubFigure, bundle: Bundle, source: ImageSource, seed: int) -> None:
    """Draw a random group: its queries, the parity query, and the lost member's answers."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = source.batch(random_groups(len(source), SHOWN, generator).members[0])
    lost = int(torch.randint(SHOWN, (), generator=generator))
    latents, parity = bundle.embed(images), bundle.encode(images[None])
    others = torch.cat([latents[:lost], latents[lost + 1 :]])
    direct = bundle.classify(latents)[lost]
    decoded = bundle.decode(parity, others[None])[0]
    made = bundle.model.fuse(images[None])[0]
    axes = panel.subplots(1, SHOWN + 2, width_ratios=[1] * (SHOWN + 1) + [2.4])
    for i, axis in enumerate(axes[:SHOWN]):
        dimmed = 0.3 if i == lost else 1.0
        name = bundle.info.classes[int(labels[i])]
        _show(axis, images[i] / 255 * dimmed, f"query {i + 1}: {name}")
    middle = {"transform": axes[lost].transAxes, "ha": "center", "va": "center"}
    axes[lost].text(0.5, 0.5, "lost", color=DECODED, fontsize=18, weight="bold", **middle)
    _show(axes[SHOWN], made, f"what E made of all {SHOWN}")
    rows, bars = np.arange(len(bundle.info.classes)), axes[-1]
    bars.barh(rows - 0.2, direct.cpu().numpy(), 0.4, color=DIRECT, label="direct, if not lost")
    bars.barh(rows + 0.2, decoded.cpu().numpy(), 0.4, color=DECODED, label="decoded")
    bars.set_yticks(rows, bundle.info.classes)
    bars.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    bars.set_title(f"probabilities of query {lost + 1}", fontsize=9)
    bars.tick_params(labelsize=7)
    bars.legend(fontsize=7, loc="best")
    panel.suptitle(f"bundle {bundle.info.name}", fontsize=10, x=0.01, ha="left")


def _show(axis: Axes, image: Tensor, title: str) -> None:
    """Show an image (C, H, W) in 0..1."""
    pixels = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    axis.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()
