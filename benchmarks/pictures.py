"""`python -m benchmarks pictures`: the pictures of the documents that explain, and measure nothing.

A late request with its copy, one scheduler for several gateways, and a group of images that is
encoded, loses a member, and is decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import codedinvnet
from codedinvnet.data import sample_images
from codedinvnet.models.coded import decode_missing

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
FIRST, COPY, CLIENT, QUIET = "#4477aa", "#228833", "#333333", "#bbbbbb"
LOST = "#cc3311"
DECODED = (
    "decode: 4 x f(parity) less f of the three that arrived; the last image is f's inverse of it"
)
GROUP = (0, 1, 2, 3)
"""Sample images of the picture of the code; the first is lost."""


def run(out: Path = IMAGES) -> dict[str, Any]:
    """Draw the pictures.

    Args:
        out: the folder to draw into.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn = {"late.png": late(), "members.png": members(), "code.png": code()}
    for name, figure in drawn.items():
        figure.savefig(out / name, dpi=110, metadata={"Software": ""}, bbox_inches="tight")
        pyplot.close(figure)
    return {"pictures": [str(out / name) for name in drawn]}


def late() -> Figure:
    """Draw the timeline of a request that is late, and of its copy."""
    figure, axis = pyplot.subplots(figsize=(9, 3.3))
    lanes = {"client": 3.0, "gateway": 2.0, "server a": 1.0, "server b": 0.0}
    for y in lanes.values():
        axis.plot([0, 40], [y, y], color=QUIET, lw=1, zorder=0)
    axis.axvspan(0, 13, color="#eeeeee", zorder=-1)
    axis.text(6.5, 3.62, "nearly all answers: 13 ms", ha="center", fontsize=9)
    bars = {"server a": (1, 39, FIRST, "stalls"), "server b": (14, 10, COPY, "works for 10 ms")}
    for lane, (start, length, colour, text) in bars.items():
        axis.barh(lanes[lane], length, left=start, height=0.32, color=colour, alpha=0.85)
        axis.text(
            start + length / 2, lanes[lane], text, color="w", ha="center", va="center", fontsize=9
        )
    # (time, from, to, colour, text, beside the arrow's middle)
    steps = (
        (0, "client", "gateway", CLIENT, "request"),
        (0.5, "gateway", "server a", FIRST, "first attempt"),
        (13.5, "gateway", "server b", COPY, "late: a copy"),
        (24.5, "server b", "gateway", COPY, "its answer"),
        (25, "gateway", "client", CLIENT, "the answer, after 25 ms"),
    )
    for time, sender, receiver, colour, said in steps:
        ends = (time, lanes[sender]), (time, lanes[receiver])
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.6}
        axis.annotate("", xy=ends[1], xytext=ends[0], arrowprops=arrow)
        middle = 2.5 if "client" in (sender, receiver) else 1.5
        axis.text(time + 0.4, middle, said, color=colour, va="center", fontsize=9)
    axis.text(40.3, 1, "answers after 500 ms:\ndropped", color=FIRST, va="center", fontsize=9)
    axis.set_yticks(list(lanes.values()), list(lanes))
    axis.set(xlim=(-0.8, 50), ylim=(-0.4, 3.9), xlabel="ms")
    axis.set_xticks(range(0, 41, 10))
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(left=False)
    return figure


def members() -> Figure:
    """Draw two gateways that decide alone, and two that have one scheduler."""
    figure, (alone, together) = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, title in (
        (alone, "alone: each knows its own requests"),
        (together, "members: one decides for all"),
    ):
        axis.set_title(title, fontsize=11)
        axis.set(xlim=(0, 10), ylim=(0, 8.2))
        axis.set_axis_off()
        for number, x in enumerate((2.5, 7.5)):
            busy = axis is alone and number == 0
            for server in range(2):
                text = f"server {'abcd'[2 * number + server]}"
                _box(
                    axis, x - 1.25 + 2.5 * server, 0.9, text, LOST if busy and not server else QUIET
                )
        for number, x in enumerate((2.5, 7.5)):
            decides = axis is alone or not number
            _box(axis, x, 4.6, f"gateway {number + 1}", FIRST if decides else QUIET, width=2.4)
            if decides:
                axis.text(x, 5.45, "scheduler", color=FIRST, ha="center", fontsize=9)
            _arrow(axis, (x, 7.6), (x, 5.8 if decides else 5.15), CLIENT)
            axis.text(x + 0.2, 7.2, "requests", fontsize=9, color=CLIENT)
    _arrow(alone, (2.5, 4.1), (1.25, 1.4), COPY)
    _arrow(alone, (7.5, 4.1), (1.6, 1.4), COPY)
    alone.text(5.3, 2.0, "both choose a:\none request waits, b idles", color=LOST, fontsize=9)
    _arrow(together, (2.5, 4.1), (1.25, 1.4), COPY)
    _arrow(together, (7.5, 4.1), (3.75, 1.4), COPY)
    for y, text, left in (
        (4.75, "a request", True),
        (4.4, "send it to b", False),
    ):
        ends = ((6.2, y), (3.8, y)) if left else ((3.8, y), (6.2, y))
        _arrow(together, *ends, FIRST, dashed=True)
        together.text(5, y + (0.15 if left else -0.5), text, color=FIRST, ha="center", fontsize=8)
    together.text(
        6.1, 2.3, "a request and its answer\nstay with their gateway", color=COPY, fontsize=9
    )
    figure.tight_layout()
    return figure


def _box(axis: Axes, x: float, y: float, text: str, colour: str, width: float = 1.9) -> None:
    corner, style = (x - width / 2, y - 0.4), "round,pad=0.05,rounding_size=0.2"
    box = FancyBboxPatch(corner, width, 0.8, boxstyle=style, fc="w", ec=colour, lw=1.8)
    axis.add_patch(box)
    axis.text(x, y, text, ha="center", va="center", fontsize=10)


def _arrow(
    axis: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    dashed: bool = False,
) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "ls": "--" if dashed else "-"}
    axis.annotate("", xy=end, xytext=start, arrowprops=style)


def code() -> Figure:
    """Draw what encoding, an erasure and decoding make of four images of MNIST."""
    bundle, samples = codedinvnet.load_bundle("mnist"), sample_images("mnist")
    images, labels = samples.batch(torch.tensor(GROUP))
    latents = bundle.embed(images)
    with torch.inference_mode():
        made = bundle.model.fuse(images[None])
    border = bundle.info.input.padding
    made = made[..., border : made.shape[-2] - border, border : made.shape[-1] - border]
    parity = bundle.encode(images[None])
    lost = decode_missing(parity, latents[None, 1:])
    seen = bundle.invert(lost)
    chance, found = bundle.decode(parity, latents[None, 1:]).max(1)
    figure, axes = pyplot.subplots(2, 6, figsize=(10, 3.9))
    for axis in axes.flat:
        axis.set_axis_off()
    pixels = images.float() / 255
    for row in range(2):
        for member in GROUP:
            if row == 0 or member:
                _show(
                    axes[row, member],
                    pixels[member],
                    f"query {member + 1}" if not row else "arrives",
                )
    _show(axes[0, 4], made[0], "E's parity query", COPY)
    axes[0, 5].text(
        0,
        0.5,
        "encode: one more worker\ncomputes f of the parity",
        transform=axes[0, 5].transAxes,
        va="center",
        fontsize=9,
    )
    _show(axes[1, 0], torch.zeros_like(pixels[0]), "lost", LOST)
    axes[1, 0].text(
        0.5,
        0.5,
        "?",
        color=LOST,
        fontsize=28,
        ha="center",
        va="center",
        transform=axes[1, 0].transAxes,
    )
    _show(axes[1, 4], made[0], "arrives", COPY)
    _show(axes[1, 5], seen[0], f"decoded: {int(found)}, p = {float(chance):.2f}", LOST)
    figure.text(
        0.5,
        0.02,
        DECODED,
        ha="center",
        fontsize=9,
    )
    assert int(found) == int(labels[0])
    return figure


def _show(axis: Axes, image: torch.Tensor, title: str, colour: str = CLIENT) -> None:
    axis.imshow(image.detach().clamp(0, 1)[0].numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9, color=colour)
