"""Students made of the served model's own graph: they start from its weights.

A network that already knows the classes needs far fewer steps than a fresh one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.common.errors import UserError, one_line
from codedinvnet.models import OpenModel
from codedinvnet.models.graph import Graph, Unsupported, read_graph
from codedinvnet.models.onnx_file import whole_onnx
from codedinvnet.models.runtime import any_batch, export
from codedinvnet.nn.resnet import BasicBlock
from codedinvnet.protect.costs import folded
from codedinvnet.protect.inputs import image_size, layout
from codedinvnet.protect.students import QUARTERS, Budget, Choice, Student, Unfit, register
from codedinvnet.protect.teacher import Teacher, scores_of

SMALLEST = 24
"""Images of a smaller side show too little."""
CLOSE = 1e-2
"""The graph's scores may differ from the model's by this share of the largest one."""
TRIED = 8
SAMPLE = 128
"""Inputs from which statistics and the effects of blocks are taken."""
EPSILON = 1e-5

Described = Mapping[str, Any]
"""A graph as `Graph.described` has it."""


class Net(NamedTuple):
    """A graph with its weights."""

    described: Described
    values: Mapping[str, Tensor]

    def build(self) -> Graph:
        """Return the module."""
        made = Graph(self.described)
        made.load_state_dict({key: self.values[name] for name, key in made.names.items()})
        return made


@lru_cache(maxsize=1)
def graph_of(teacher: Teacher) -> Net:
    """Return the served model's graph up to its logits.

    Raises:
        Unfit: if there is none.
    """
    model, batch = teacher.model, teacher.inputs.batch(teacher.rows.train[:TRIED])
    if len(batch) != 1:
        raise Unfit("the model has several inputs")
    (array,) = batch.values()
    try:
        content, output = _content(model, torch.from_numpy(array))
        graph = read_graph(content, output, logits=teacher.kind == "probabilities").eval()
        with torch.inference_mode():
            scores = graph(torch.from_numpy(array).float())
    except Unsupported as error:
        raise Unfit(str(error)) from error
    except Exception as error:  # PyTorch has many for what does not fit
        raise Unfit(f"PyTorch cannot compute its graph: {one_line(error)}") from error
    found = (scores.softmax(1) if teacher.kind == "probabilities" else scores).numpy()
    wanted = scores_of(model, batch)
    close = CLOSE * abs(wanted).max()
    if found.shape != wanted.shape or not abs(found - wanted).max() <= close:  # NaN neither
        raise Unfit("PyTorch computes other scores from its graph")
    values = {name: getattr(graph, key).detach().clone() for name, key in graph.names.items()}
    return Net(graph.described, values)


def _content(model: OpenModel, example: Tensor) -> tuple[Any, str]:
    """Return a model as ONNX with folded constants, and the name of its scores."""
    import onnx

    assert model.signature.scores is not None
    name = model.signature.scores.output
    if model.source.kind == "onnx":
        return folded(whole_onnx(Path(model.source.source))), name
    if model.network is None:
        raise Unsupported("only its server has its weights")
    names = [spec.name for spec in model.signature.outputs]
    try:
        content = export(model.network, [example], output_names=names, dynamic_shapes=any_batch(1))
    except UserError as error:
        raise Unsupported(str(error)) from error
    return folded(onnx.load_from_string(content)), name


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
        self.reduced = all(told.get("group", 1) == 1 for *_, told in net.described["nodes"])
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


def _budget_macs(budget: Budget) -> int:
    if budget.macs is None:
        raise Unfit(f"its multiply-adds are not known: {budget.cost.why}")
    return budget.macs


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
    def choose(cls, teacher: Teacher, budget: Budget) -> Choice:
        height, width = image_size(teacher.inputs.specs[0])
        side, least, most = height, SMALLEST * max(1.0, height / width), _budget_macs(budget)
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
        kept = Net(without(net.described, choice["without"]), net.values)
        return normalised(kept, sample(teacher))

    @classmethod
    def choose(cls, teacher: Teacher, budget: Budget) -> Choice:
        most, net = _budget_macs(budget), graph_of(teacher)
        ranked = ranked_blocks(teacher)
        if not ranked:
            raise Unfit("the model has no residual blocks that can be left out")
        x = sample(teacher, 1)
        for count in range(1, len(ranked) + 1):
            if _macs(Net(without(net.described, ranked[:count]), net.values), x) <= most:
                return {"without": ranked[:count]}
        raise Unfit("the model without its residual blocks still costs more")


@lru_cache(maxsize=1)
def ranked_blocks(teacher: Teacher) -> list[tuple[str, str]]:
    """Return the residual blocks, first those that change the answers least for what they cost."""
    net, x = graph_of(teacher), sample(teacher)
    logs = torch.from_numpy(teacher.log_probabilities[teacher.spread(SAMPLE)])
    whole, ranked = _macs(net, x[:1]), []
    for block in residual_blocks(net, x[:1]):
        rest = Net(without(net.described, [block]), net.values)
        with torch.inference_mode():
            found = rest.build().eval()(x).log_softmax(1)
        change = float((logs.exp() * (logs - found)).sum(1).mean())
        ranked.append((change / max(1, whole - _macs(rest, x[:1])), block))
    return [block for _, block in sorted(ranked)]


def sample(teacher: Teacher, count: int = SAMPLE) -> Tensor:
    """Return some training images as floats."""
    (array,) = teacher.inputs.batch(teacher.spread(count)).values()
    return torch.from_numpy(array).float()


@register
class EarlyExit(OwnStudent):
    """The model's first stages, with a new block and classifier behind them."""

    family = "early-exit"
    rates: ClassVar[Mapping[str, float]] = {"learning_rate": 2e-3, "weight_decay": 0.01}

    def __init__(self, teacher: Teacher, choice: Choice) -> None:
        super().__init__(teacher, choice)
        self.head = new_head(int(choice["channels"]), teacher.classes)

    def variant(self, teacher: Teacher, net: Net, choice: Choice) -> Net:
        return normalised(Net(pruned(net.described, choice["after"]), net.values), sample(teacher))

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(super().forward(*inputs))
        return logits

    @classmethod
    def choose(cls, teacher: Teacher, budget: Budget) -> Choice:
        most, net = _budget_macs(budget), graph_of(teacher)
        x = sample(teacher, 1)
        shapes, found = shapes_of(net, x), None
        for name in cut_points(net.described):
            if len(shapes[name]) != 4 or min(shapes[name][2:]) < 2 * QUARTERS:
                continue
            head, maps = (
                new_head(shapes[name][1], teacher.classes).eval(),
                torch.zeros(shapes[name]),
            )
            first = _macs(Net(pruned(net.described, name), net.values), x)
            if first + count_macs(partial(head, maps)) > most:
                break
            found = {"after": name, "channels": shapes[name][1]}
        if found is None:
            raise Unfit("no first stage of the model is cheap enough")
        return found


def new_head(channels: int, classes: int) -> nn.Sequential:
    """Return a residual block and a classifier of maps."""
    return nn.Sequential(
        BasicBlock(channels, 2 * channels, 2),
        nn.AdaptiveAvgPool2d(QUARTERS),
        nn.Flatten(),
        nn.Linear(2 * channels * QUARTERS**2, classes),
    )


def _macs(net: Net, x: Tensor) -> int:
    network = net.build().eval()
    return count_macs(lambda: network(x))


def shapes_of(net: Net, x: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a graph's tensors for an input."""
    with torch.inference_mode():
        found = net.build().eval().tensors(x)
    return {name: tuple(t.shape) for name, t in found.items() if isinstance(t, Tensor)}


def pruned(described: Described, output: str | None = None) -> Described:
    """Return a graph up to its output, or to another of its tensors."""
    output = output or described["output"]
    wanted, nodes = {output}, []
    for node in reversed(described["nodes"]):
        if node[2] in wanted:
            nodes.append(node)
            wanted.update(node[1])
    kept = {
        key: {name: value for name, value in described[key].items() if name in wanted}
        for key in ("tensors", "plain")
    }
    return {**described, **kept, "nodes": nodes[::-1], "output": output}


def without(described: Described, blocks: Sequence[Sequence[str]]) -> Described:
    """Return a graph in which the sums of residual blocks are replaced by their shortcuts."""
    instead = {out: kept for out, kept in blocks}

    def resolved(name: str) -> str:
        while name in instead:
            name = instead[name]
        return name

    nodes = [
        [operator, [resolved(name) for name in inputs], output, told]
        for operator, inputs, output, told in described["nodes"]
        if output not in instead
    ]
    return pruned({**described, "nodes": nodes})


def residual_blocks(net: Net, x: Tensor) -> list[tuple[str, str]]:
    """Return (sum, shortcut) of all residual blocks that keep the shape of their input."""
    makers = {node[2]: node for node in net.described["nodes"]}
    shapes = shapes_of(net, x)

    def needs(name: str, other: str) -> bool:
        seen, stack = set(), [name]
        while stack:
            found = stack.pop()
            if found == other:
                return True
            if found in makers and found not in seen:
                seen.add(found)
                stack.extend(makers[found][1])
        return False

    blocks = []
    for operator, inputs, output, _ in net.described["nodes"]:
        if operator != "Add" or not all(name in makers for name in inputs):
            continue
        one, other = inputs
        for branch, shortcut in ((one, other), (other, one)):
            if shapes[shortcut] == shapes[output] and needs(branch, shortcut):
                blocks.append((output, shortcut))
                break
    return blocks


def cut_points(described: Described) -> list[str]:
    """Return the tensors through which everything behind them goes, in order."""
    nodes, found = described["nodes"], []
    last = {name: place for place, node in enumerate(nodes) for name in node[1]}
    for place, node in enumerate(nodes[:-1]):
        made = [described["input"], *(earlier[2] for earlier in nodes[: place + 1])]
        if [name for name in made if last.get(name, -1) > place] == [node[2]]:
            found.append(node[2])
    return found


def normalised(net: Net, x: Tensor) -> Net:
    """Add a batch normalisation that changes nothing at first behind each bare convolution.

    Exporters fold normalisations into convolutions, and without them training is slow and frail.
    """
    nodes = net.described["nodes"]
    has_one = {node[1][0] for node in nodes if node[0] == "BatchNormalization"}
    with torch.inference_mode():
        found = net.build().eval().tensors(x)
    made, tensors, values = [], dict(net.described["tensors"]), dict(net.values)
    for operator, inputs, output, told in nodes:
        if operator != "Conv" or output in has_one:
            made.append([operator, inputs, output, told])
            continue
        mean = found[output].mean((0, 2, 3)).clone()
        variance = found[output].var((0, 2, 3), correction=0).clone()
        own = {
            "scale": (variance + EPSILON).sqrt(),
            "bias": mean.clone(),
            "mean": mean,
            "variance": variance,
        }
        for key, value in own.items():
            trained = key in ("scale", "bias")
            values[f"{output}.{key}"] = value
            tensors[f"{output}.{key}"] = {"shape": list(value.shape), "trained": trained}
        made.append([operator, inputs, f"{output}.raw", told])
        names = [f"{output}.raw", *(f"{output}.{key}" for key in own)]
        made.append(["BatchNormalization", names, output, {"epsilon": EPSILON}])
    return Net({**net.described, "nodes": made, "tensors": tensors}, values)
