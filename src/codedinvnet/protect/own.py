"""Students made of the served model's own graph: they start from its weights.

A network that already knows the classes needs far fewer steps than a fresh one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

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


class Net(NamedTuple):
    """A graph, as `Graph.described` has it, with its weights."""

    described: Mapping[str, Any]
    values: Mapping[str, Tensor]

    def build(self) -> Graph:
        """Return the module."""
        made = Graph(self.described)
        made.load_state_dict({key: self.values[name] for name, key in made.names.items()})
        return made.eval()

    def macs(self, x: Tensor) -> int:
        """Count the multiply-adds of one query."""
        network = self.build()
        return count_macs(lambda: network(x[:1]))


@lru_cache(maxsize=1)
def graph_of(teacher: Teacher) -> Net:
    """Return the served model's graph up to its logits; Unfit if there is none."""
    model, likely = teacher.model, teacher.kind == "probabilities"
    batch = teacher.inputs.batch(teacher.spread(TRIED))
    try:
        output = scores_tensor(model.signature).name
        graph = read_graph(teacher.onnx, output, logits=likely).eval()
        with torch.inference_mode():
            scores = graph(sample(teacher, TRIED))
    except Exception as error:  # PyTorch has many for what does not fit
        raise Unfit(f"PyTorch cannot compute its graph: {one_line(error)}") from error
    found = (scores.softmax(1) if likely else scores).numpy()
    wanted = scores_of(model, batch)
    if found.shape != wanted.shape or differ(wanted, found, CLOSE):
        raise Unfit("PyTorch computes other scores from its graph")
    values = {name: getattr(graph, key).detach().clone() for name, key in graph.names.items()}
    return Net(graph.described, values)


def sample(teacher: Teacher, count: int = SAMPLE) -> Tensor:
    """Return some training images as floats."""
    (array,) = teacher.inputs.batch(teacher.spread(count)).values()
    return torch.from_numpy(array).float()


class OwnStudent(Student):
    """A variant of the served model's graph."""

    kinds = ("images",)
    rates: ClassVar[Mapping[str, float]] = {"learning_rate": 5e-4, "weight_decay": 0.01}

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        super().__init__(teacher, choice)
        (spec,) = self.specs
        self.last = layout(spec)[1]
        net = self.variant(teacher, graph_of(teacher), choice)
        # In bfloat16 the gradients of depthwise convolutions take twice as long.
        self.reduced = all(options.get("group", 1) == 1 for *_, options in net.described["nodes"])
        self.network = net.build()
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def variant(self, teacher: Teacher, net: Net, choice: Choice) -> Net:
        """Return the part of the graph that is kept; all of it unless a class says otherwise."""
        return net

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

    def variant(self, teacher: Teacher, net: Net, choice: Choice) -> Net:
        return normalised(without(net, [(a, b) for a, b in choice["without"]]), sample(teacher))

    @classmethod
    def choose(cls, teacher: Teacher, most: int) -> Choice:
        net, ranked = graph_of(teacher), ranked_blocks(teacher)
        if not ranked:
            raise Unfit("the model has no residual blocks that can be left out")
        for count in range(1, len(ranked) + 1):
            if without(net, ranked[:count]).macs(sample(teacher, 1)) <= most:
                return {"without": ranked[:count]}
        raise Unfit("the model without its residual blocks still costs more")


@lru_cache(maxsize=1)
def ranked_blocks(teacher: Teacher) -> list[tuple[str, str]]:
    """Return the residual blocks, first those that change the answers least for what they cost."""
    net, x = graph_of(teacher), sample(teacher)
    logs = torch.from_numpy(teacher.log_probabilities[teacher.spread(SAMPLE)])
    whole, ranked = net.macs(x), []
    for block in residual_blocks(net, x):
        rest = without(net, [block])
        with torch.inference_mode():
            found = rest.build()(x).log_softmax(1)
        change = float((logs.exp() * (logs - found)).sum(1).mean())
        ranked.append((change / max(1, whole - rest.macs(x)), block))
    return [block for _, block in sorted(ranked)]


def without(net: Net, blocks: Collection[tuple[str, str]]) -> Net:
    """Return a graph in which the sums of residual blocks are replaced by their shortcuts."""
    described, instead = net.described, dict(blocks)

    def resolved(name: str) -> str:
        while name in instead:
            name = instead[name]
        return name

    wanted, nodes = {described["output"]}, []
    for operator, inputs, output, options in reversed(described["nodes"]):
        if output in wanted and output not in instead:
            nodes.append([operator, [resolved(name) for name in inputs], output, options])
            wanted.update(nodes[-1][1])
    kept = {
        key: {name: value for name, value in described[key].items() if name in wanted}
        for key in ("tensors", "plain")
    }
    return Net({**described, **kept, "nodes": nodes[::-1]}, net.values)


def residual_blocks(net: Net, x: Tensor) -> list[tuple[str, str]]:
    """Return (sum, shortcut) of all residual blocks that keep the shape of their input."""
    makers = {node[2]: node[1] for node in net.described["nodes"]}
    with torch.inference_mode():
        tensors = net.build().tensors(x[:1])

    def needs(name: str, other: str) -> bool:
        seen, stack = set(), [name]
        while stack:
            found = stack.pop()
            if found == other:
                return True
            if found in makers and found not in seen:
                seen.add(found)
                stack.extend(makers[found])
        return False

    blocks = []
    for operator, inputs, output, _ in net.described["nodes"]:
        if operator != "Add" or not all(name in makers for name in inputs):
            continue
        for branch, shortcut in (inputs, inputs[::-1]):
            if tensors[shortcut].shape == tensors[output].shape and needs(branch, shortcut):
                blocks.append((output, shortcut))
                break
    return blocks


def normalised(net: Net, x: Tensor) -> Net:
    """Add a batch normalisation that changes nothing at first behind each bare convolution.

    Exporters fold normalisations into convolutions, and without them training is slow and frail.
    """
    nodes = net.described["nodes"]
    has_one = {node[1][0] for node in nodes if node[0] == "BatchNormalization"}
    with torch.inference_mode():
        found = net.build().tensors(x)
    made, tensors, values = [], dict(net.described["tensors"]), dict(net.values)
    for operator, inputs, output, options in nodes:
        if operator != "Conv" or output in has_one:
            made.append([operator, inputs, output, options])
            continue
        mean, variance = found[output].mean((0, 2, 3)), found[output].var((0, 2, 3), correction=0)
        own = {"scale": (variance + EPSILON).sqrt(), "bias": mean}
        own |= {"mean": mean, "variance": variance}
        for key, value in own.items():
            values[f"{output}.{key}"] = value.clone()
            trained = key in ("scale", "bias")
            tensors[f"{output}.{key}"] = {"shape": list(value.shape), "trained": trained}
        made.append([operator, inputs, f"{output}.raw", options])
        names = [f"{output}.raw", *(f"{output}.{key}" for key in own)]
        made.append(["BatchNormalization", names, output, {"epsilon": EPSILON}])
    return Net({**net.described, "nodes": made, "tensors": tensors}, values)
