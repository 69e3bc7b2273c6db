"""Students made of the served model's own graph: they start from its weights.

A network that already knows the classes needs far fewer steps than a fresh one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.common.errors import one_line
from codedinvnet.models.base import scores_tensor
from codedinvnet.models.graph import Graph, read_graph
from codedinvnet.models.probe import differ
from codedinvnet.protect.inputs import image_size, layout
from codedinvnet.protect.students import Choice, Student, Unfit, register
from codedinvnet.protect.teacher import Teacher, scores_of

SMALLEST = 24
"""Images of a smaller side show too little."""
CLOSE = 1e-2
"""The graph's scores may differ from the model's by this share of the largest one."""
TRIED, SAMPLE = 8, 128
"""Training inputs that the graph is checked with, and that blocks are ranked by."""
EPSILON = 1e-5


@lru_cache(maxsize=1)
def graph_of(teacher: Teacher) -> Graph:
    """Return the served model's graph up to its logits; Unfit if there is none."""
    likely, batch = teacher.kind == "probabilities", teacher.inputs.batch(teacher.spread(TRIED))
    try:
        output = scores_tensor(teacher.model.signature).name
        graph = read_graph(teacher.onnx, output, logits=likely).eval()
        with torch.inference_mode():
            scores = graph(sample(teacher, TRIED))
    except Exception as error:  # PyTorch has many for what does not fit
        raise Unfit(f"PyTorch cannot compute its graph: {one_line(error)}") from error
    found = (scores.softmax(1) if likely else scores).numpy()
    wanted = scores_of(teacher.model, batch)
    if found.shape != wanted.shape or differ(wanted, found, CLOSE):
        raise Unfit("PyTorch computes other scores from its graph")
    return graph


def sample(teacher: Teacher, count: int = SAMPLE) -> Tensor:
    """Return some training images as floats."""
    (array,) = teacher.inputs.batch(teacher.spread(count)).values()
    return torch.from_numpy(array).float()


class OwnStudent(Student):
    """A variant of the served model's graph.

    Args:
        teacher: the served model.
        choice: what `choose` found.
        graph: the part of its graph that is kept; None: all of it.
    """

    kind = "images"
    rates: ClassVar[Mapping[str, float]] = {"learning_rate": 5e-4, "weight_decay": 0.01}

    def __init__(self, teacher: Teacher, choice: Choice, graph: Graph | None = None) -> None:
        super().__init__(teacher, choice)
        self.last = layout(self.specs[0])[1]
        self.network = Graph((graph or graph_of(teacher)).described).eval()
        # In bfloat16 the gradients of depthwise convolutions take twice as long.
        nodes = self.network.described["nodes"]
        self.reduced = all(options.get("group", 1) == 1 for *_, options in nodes)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def prepare(self, x: Tensor) -> Tensor:
        """Change images (B, C, H, W) before the network sees them."""
        return x

    def forward(self, *inputs: Tensor) -> Tensor:
        x = (inputs[0].permute(0, 3, 1, 2) if self.last else inputs[0]).float()
        x = self.prepare(x).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(x.permute(0, 2, 3, 1) if self.last else x)
        return logits


@register
class SmallerImages(OwnStudent):
    """The whole model on smaller images."""

    family = "smaller-images"

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        self.size = (int(choice["height"]), int(choice["width"]))
        super().__init__(teacher, choice)
        self.pool = max(1, image_size(self.specs[0])[0] // self.size[0])

    def prepare(self, x: Tensor) -> Tensor:
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        return x

    @classmethod
    def choose(cls, teacher: Teacher, most: int) -> Choice:
        height, width = image_size(teacher.inputs.specs[0])
        side, least = height, SMALLEST * max(1.0, height / width)
        graph_of(teacher)
        while side >= least:
            choice = {"height": side, "width": max(1, round(width * side / height))}
            try:
                macs = cls(teacher, choice).eval().macs()
            except (RuntimeError, IndexError, ValueError) as error:
                raise Unfit("the model takes images of one size only") from error
            if macs <= most:
                return choice
            side = min(side - 1, int(side * (most / macs) ** 0.5) + 2)  # never too far
        raise Unfit(f"images would have fewer than {SMALLEST} pixels a side")


@register
class FewerBlocks(OwnStudent):
    """The model without the residual blocks that change its answers least."""

    family = "fewer-blocks"
    rates: ClassVar[Mapping[str, float]] = {"learning_rate": 2e-3, "weight_decay": 0.01}

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        kept = without(graph_of(teacher), choice["without"])
        super().__init__(teacher, choice, normalised(kept, sample(teacher)))

    @classmethod
    def choose(cls, teacher: Teacher, most: int) -> Choice:
        graph, ranked = graph_of(teacher), ranked_blocks(teacher)
        if not ranked:
            raise Unfit("the model has no residual blocks that can be left out")
        for count in range(1, len(ranked) + 1):
            if graph_macs(without(graph, ranked[:count]), sample(teacher, 1)) <= most:
                return {"without": ranked[:count]}
        raise Unfit("the model without its residual blocks still costs more")


def graph_macs(graph: Graph, x: Tensor) -> int:
    """Count the multiply-adds of one query."""
    return count_macs(lambda: graph(x[:1]))


@lru_cache(maxsize=1)
def ranked_blocks(teacher: Teacher) -> list[tuple[str, str]]:
    """Return the residual blocks, first those that change the answers least for what they cost."""
    graph, x = graph_of(teacher), sample(teacher)
    logs = torch.from_numpy(teacher.log_probabilities[teacher.spread(SAMPLE)])
    whole, ranked = graph_macs(graph, x), []
    for block in residual_blocks(graph, x):
        rest = without(graph, [block])
        with torch.inference_mode():
            found = rest(x).log_softmax(1)
        change = float((logs.exp() * (logs - found)).sum(1).mean())
        ranked.append((change / max(1, whole - graph_macs(rest, x)), block))
    return [block for _, block in sorted(ranked)]


def without(graph: Graph, blocks: Iterable[Sequence[str]]) -> Graph:
    """Return a graph in which the sums of residual blocks are replaced by their shortcuts."""
    described, instead = graph.described, {total: shortcut for total, shortcut in blocks}

    def resolved(name: str) -> str:
        return resolved(instead[name]) if name in instead else name

    wanted, nodes = {described["output"]}, []
    for operator, inputs, output, options in reversed(described["nodes"]):
        if output in wanted and output not in instead:
            nodes.append([operator, [resolved(name) for name in inputs], output, options])
            wanted.update(nodes[-1][1])
    tensors = {name: value for name, value in described["tensors"].items() if name in wanted}
    return Graph({**described, "tensors": tensors, "nodes": nodes[::-1]}).eval()


def residual_blocks(graph: Graph, x: Tensor) -> list[tuple[str, str]]:
    """Return (sum, shortcut) of all residual blocks that keep the shape of their input."""
    with torch.inference_mode():
        tensors = graph.tensors(x[:1])
    blocks, needs = [], dict[str, set[str]]()
    for operator, inputs, output, _ in graph.described["nodes"]:
        needs[output] = set(inputs).union(*(needs.get(name, ()) for name in inputs))
        if operator == "Add" and all(name in needs for name in inputs):
            for branch, shortcut in (inputs, inputs[::-1]):
                if tensors[shortcut].shape == tensors[output].shape and shortcut in needs[branch]:
                    blocks.append((output, shortcut))
                    break
    return blocks


def normalised(graph: Graph, x: Tensor) -> Graph:
    """Add a batch normalisation that changes nothing at first behind each bare convolution.

    Exporters fold normalisations into convolutions, and without them training is slow and frail.
    """
    nodes, tensors = graph.described["nodes"], dict(graph.described["tensors"])
    has_one = {node[1][0] for node in nodes if node[0] == "BatchNormalization"}
    with torch.inference_mode():
        found = graph.tensors(x)
    made = []
    for operator, inputs, output, options in nodes:
        if operator != "Conv" or output in has_one:
            made.append([operator, inputs, output, options])
            continue
        mean, variance = found[output].mean((0, 2, 3)), found[output].var((0, 2, 3), correction=0)
        own = {"scale": (variance + EPSILON).sqrt(), "bias": mean}
        own |= {"mean": mean, "variance": variance}
        for key, value in own.items():
            trained = key in ("scale", "bias")
            tensors[f"{output}.{key}"] = {"value": value.clone(), "trained": trained}
        made.append([operator, inputs, f"{output}.raw", options])
        names = [f"{output}.raw", *(f"{output}.{key}" for key in own)]
        made.append(["BatchNormalization", names, output, {"epsilon": EPSILON}])
    return Graph({**graph.described, "nodes": made, "tensors": tensors})
