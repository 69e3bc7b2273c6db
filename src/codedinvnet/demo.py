"""The demonstration: shipped weights, shipped test images, every worker erased in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Rectangle
from torch import Tensor

from codedinvnet.codes.build import scheme_for
from codedinvnet.data import ImageSource, sample_images
from codedinvnet.evaluation.accuracy import Evaluation, evaluate
from codedinvnet.files import write_picture
from codedinvnet.models.bundle import Bundle, load_bundle

GROUP_SIZES = (2, 4, 10)
INK, DIRECT, DECODED, ERASED = "#222222", "#4477AA", "#EE7733", "#CC3311"


def run_demo(names: Sequence[str], folder: Path, seed: int = 0) -> None:
    """Evaluate bundles on the shipped test images, print a table, and draw a picture for each."""
    folder.mkdir(parents=True, exist_ok=True)  # before the work
    rows = []
    for name in names:
        bundle, source = load_bundle(name), sample_images(name)
        for k in GROUP_SIZES:
            rows.append((name, evaluate(scheme_for(bundle, k), source, k=k, seed=seed)))
    print(table(rows))
    for name in names:
        path = folder / f"{name}.png"
        draw_group(load_bundle(name), sample_images(name), path, k=10, seed=seed)
        print(f"picture: {path}")


def table(rows: Sequence[tuple[str, Evaluation]]) -> str:
    """Return the evaluations as a text table."""
    lines = [
        "Every worker erased in turn; accuracy in % of the shipped 1,000 test images, 5 groupings",
        f"{'bundle':<9}{'k':>3}  {'overhead':>8}  {'normal':>7}  {'recovered':>9}  "
        f"{'worst position':>14}  {'agreement':>9}",
    ]
    for name, e in rows:
        lines.append(
            f"{name:<9}{e.k:>3}  {100 / e.k:>7.0f}%  {100 * e.normal_accuracy:>7.1f}  "
            f"{100 * e.recovered_accuracy:>9.1f}  {100 * e.worst_position_accuracy:>14.1f}  "
            f"{100 * e.agreement:>9.1f}"
        )
    return "\n".join(lines)


def draw_group(bundle: Bundle, source: ImageSource, path: Path, *, k: int, seed: int) -> None:
    """Draw one random group: its images, its parity image, and one erased query's two answers."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(source), generator=generator)[:k]
    erased = int(torch.randint(k, (), generator=generator))
    images, labels = source.batch(rows)
    with torch.inference_mode():
        latents = bundle.embed(images)
        direct = bundle.classify(latents)[erased]
        kept = torch.tensor([i for i in range(k) if i != erased])
        decoded = bundle.decode(bundle.encode(images[None]), latents[kept][None], erased)[0]
        parity = bundle.model.parity_images(images[None])[0]
    figure = plt.figure(figsize=(7.6, 4.6), constrained_layout=True)
    top, bottom = (figure.add_subfigure(part) for part in _rows(figure))
    columns = (k + 1) // 2
    grid = top.subplots(2, columns + 2, squeeze=False)
    for position in range(2 * columns):
        axis = grid[position // columns][position % columns]
        axis.axis("off")
        if position < k:
            show(axis, bundle.model.prepare(images[position]))
            name = source.classes[int(labels[position])]
            if position == erased:
                axis.set_title(f"{name} (lost)", fontsize=9, color=ERASED, fontweight="bold")
                frame = Rectangle(
                    (0, 0), 1, 1, transform=axis.transAxes, fill=False, ec=ERASED, lw=4
                )
                axis.add_patch(frame)
            else:
                axis.set_title(name, fontsize=9, color=INK)
    for row in grid:
        for axis in row[columns:]:
            axis.remove()
    axis = top.add_subplot(grid[0][0].get_gridspec()[:, columns:])
    axis.axis("off")
    show(axis, parity)
    axis.set_title(f"parity query of all {k}", fontsize=10, color=INK)
    left, right = bottom.subplots(1, 2, sharey=True)
    truth = int(labels[erased])
    for axis, probabilities, colour, title in (
        (left, direct, DIRECT, "direct: the lost worker"),
        (right, decoded, DECODED, f"decoded: the other {k - 1} and the parity"),
    ):
        draw_probabilities(axis, probabilities, source.classes, truth, colour)
        answer = source.classes[int(probabilities.argmax())]
        axis.set_title(f"{title}\n→ {answer} ({float(probabilities.max()):.0%})", fontsize=10)
    left.set_ylabel("probability")
    bottom.supxlabel("class (true class in bold)", fontsize=9)
    write_picture(path, figure)
    plt.close(figure)


def _rows(figure: Figure) -> tuple[SubplotSpec, SubplotSpec]:
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 1.45])
    return grid[0], grid[1]


def show(axis: Axes, image: Tensor) -> None:
    """Show an image (C, H, W) in 0..1; what lies outside is clipped."""
    picture = image.clamp(0, 1).permute(1, 2, 0).numpy()
    axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray_r")


def draw_probabilities(
    axis: Axes, probabilities: Tensor, classes: Sequence[str], truth: int, colour: str
) -> None:
    """Draw one bar a class."""
    axis.bar(range(len(classes)), probabilities.tolist(), color=colour)
    axis.set_ylim(0, 1.05)
    axis.spines[["top", "right"]].set_visible(False)
    turned = max(len(name) for name in classes) > 3
    axis.set_xticks(
        range(len(classes)),
        classes,
        rotation=35 if turned else 0,
        ha="right" if turned else "center",
        fontsize=8,
    )
    axis.get_xticklabels()[truth].set_fontweight("bold")
