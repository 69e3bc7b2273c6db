"""A code around a frozen model: E makes one query of a group's, and scores are decoded.

The model's scores of E's query shall be the mean of the members' own, so that a missing member's
are m times it less those of the others. A recovery head answers from the decoded scores, and from
the side features that E sends of every member.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.base import Encoded, ScoresCode
from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.codes.rules import Parities
from codedinvnet.errors import one_line
from codedinvnet.models import OpenModel
from codedinvnet.models.base import scores_tensor
from codedinvnet.models.graph import Unsupported
from codedinvnet.nn.fusion import Encoding, FusionEncoder, LeanFusion, weighted_mean
from codedinvnet.nn.head import RecoveryHead
from codedinvnet.protect.images import layout
from codedinvnet.protect.shrunk import graph_of
from codedinvnet.protect.students import Shape

Evidence: TypeAlias = Literal["both", "scores", "side"]
"""What a decoded answer rests on: the decoded scores, the member's side features, or both."""
SIDE, HIDDEN = 64, 128
"""Side features of a member at most, and hidden units of the recovery head."""
LEAST = 1e-4
"""Smaller probabilities count as this: the logarithm of next to nothing says nothing."""
STEP = 8
"""E halves images three times."""


class VectorFusion(FusionEncoder):
    """E for queries that are no images: a correction to the average query."""

    def __init__(self, features: int, width: int, side_features: int) -> None:
        super().__init__()
        self.side_features = side_features
        self.into = nn.Sequential(
            nn.Linear(features, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )
        self.out = nn.Linear(width, features)
        self.to_side = nn.Linear(width, side_features)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def encode(self, x: Tensor, weights: Tensor) -> Encoding:
        """Encode groups x (B, m, features) with weights (B, m)."""
        h = self.into(x)
        parity = weighted_mean(x, weights) + self.out(weighted_mean(h, weights))
        return Encoding(parity, self.to_side(h))


class FrozenCoder(nn.Module):
    """E and the recovery head for one frozen model.

    Args:
        shape: of inputs of the kind "images" or "vectors"; its width is E's.
        scores: the kind of the model's scores, "logits" or "probabilities".
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Shape, scores: str) -> None:
        super().__init__()
        self.shape, self.scores = shape, scores
        (spec,) = shape.inputs
        classes, side = shape.classes, min(SIDE, 4 * shape.classes)
        self.last = False
        if shape.kind == "images":
            channels, self.last = layout(spec)
            self.encoder: FusionEncoder = LeanFusion(
                channels, width=shape.width, side_features=side
            )
            self.register_buffer("mean", torch.zeros(channels, 1, 1))
        else:
            channels = math.prod(spec.shape)
            self.encoder = VectorFusion(channels, shape.width, side)
            self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones_like(self.mean))
        self.head = RecoveryHead((classes, 1, 1), classes, hidden=HIDDEN, side_features=side)

    def learn_scale(self, batch: Mapping[str, np.ndarray], levels: Tensor) -> None:
        """Take means and deviations of the inputs and of the model's scores from some of them."""
        (array,) = batch.values()
        x = self._arranged(torch.from_numpy(array)[:, None])[:, 0]
        axes = (0, 2, 3) if self.shape.kind == "images" else (0,)
        self.mean = x.mean(dim=axes).view_as(self.mean)
        std = x.std(dim=axes).view_as(self.std)
        self.std = torch.where(std > 1e-6, std, 1.0)
        self.head.norm.initialise(levels[:, :, None, None])

    def _arranged(self, x: Tensor) -> Tensor:
        """Return queries (B, m, *shape) as E takes them, floats with channels first."""
        if self.shape.kind != "images":
            return x.flatten(2).float()
        return (x.permute(0, 1, 4, 2, 3) if self.last else x).float()

    def encode(self, queries: Tensor) -> Encoding:
        """Map groups (B, m, *shape) to queries for the model, (B, *shape), and side features."""
        x = (self._arranged(queries) - self.mean) / self.std
        if self.shape.kind == "images":
            height, width = x.shape[-2:]
            x = F.pad(x, (0, -width % STEP, 0, -height % STEP))
            parity, side = self.encoder(x)
            parity = parity[..., :height, :width]
        else:
            parity, side = self.encoder(x)
        parity = parity.float() * self.std + self.mean
        if self.last:
            parity = parity.permute(0, 2, 3, 1)
        return Encoding(parity.reshape(-1, *queries.shape[2:]), side.float())

    def level(self, scores: Tensor) -> Tensor:
        """Return what is averaged and subtracted: log-probabilities around their mean."""
        scores = scores.float()  # the model's may be of 16 or 64 bits
        logs = scores.clamp_min(LEAST).log() if self.scores == "probabilities" else scores
        return logs - logs.mean(dim=-1, keepdim=True)

    def answer(
        self, decoded: Tensor, side: Tensor, members: int, evidence: Evidence = "both"
    ) -> Tensor:
        """Map decoded levels (B, classes) and side features (B, n) to logits."""
        if evidence == "side":
            return self.head.from_side(side)
        z = decoded[:, :, None, None]
        if evidence == "scores":
            return self.head.from_latent(z, decoded, members)
        logits: Tensor = self.head(z, side, decoded, members)
        return logits


class FrozenCode(ScoresCode):
    """Task k sends the model's scores of E's query, and behind them the members' side features.

    One missing member is decoded from both. For several their side features answer (`guesses`).

    Args:
        coder: E and the recovery head, in evaluation mode.
        k: the most queries in a group.
        evidence: the evidence that decoded answers rest on.
    """

    def __init__(self, coder: FrozenCoder, k: int, evidence: Evidence = "both") -> None:
        super().__init__(Parities(k, guesses=evidence != "scores"))
        self.coder, self.evidence = coder, evidence

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Run E on the members (B, m, *shape)."""
        encoding = self.coder.encode(queries)
        return Encoded(encoding.parity, encoding.side.flatten(1))

    def decode(self, outputs: Mapping[int, Tensor], size: int) -> Mapping[int, Tensor]:
        """Answer what is determined, and guess what is not if that can be."""
        answers = dict(super().decode(outputs, size))
        if self.rules.guesses and self.rules.k in outputs:
            for member in set(range(size)) - answers.keys():
                answers[member] = self._scores(
                    self.coder.head.from_side(self._side(outputs, size)[:, member])
                )
        return answers

    def made_up(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        classes = self.coder.shape.classes
        parity = self.coder.level(outputs[self.rules.k][:, :classes])
        others = [self.coder.level(outputs[i]) for i in range(size) if i != member]
        decoded = size * parity - torch.stack(others).sum(0) if others else parity
        side = self._side(outputs, size)[:, member]
        return self._scores(self.coder.answer(decoded, side, size, self.evidence))

    def _side(self, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        side = outputs[self.rules.k][:, self.coder.shape.classes :].float()
        return side.reshape(len(side), size, -1)

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(1) if self.coder.scores == "probabilities" else logits


def frozen_scores(model: OpenModel, batch: dict[str, np.ndarray]) -> Callable[[Tensor], Tensor]:
    """Return what maps queries (B, *shape), floats, to scores, with gradients.

    Args:
        model: the served model; ONNX Runtime has no gradients, so its graph is computed here.
        batch: as many queries as there will be at once; they are tried, and so is one alone.

    Raises:
        Unsupported: if that cannot be; the message says why.
    """
    network, output = model.network, scores_tensor(model.signature).name
    if network is None:
        graph = graph_of(model, batch).requires_grad_(False)
        assert model.signature.scores is not None
        probabilities = model.signature.scores.kind == "probabilities"
        return _tried(lambda q: graph(q).softmax(1) if probabilities else graph(q), batch)
    (array,) = batch.values()
    dtype = torch.from_numpy(array).dtype

    def scores(queries: Tensor) -> Tensor:
        found: Tensor = network.named([queries.to(dtype)])[output]
        return found

    return _tried(scores, batch)


def _tried(
    scores: Callable[[Tensor], Tensor], batch: Mapping[str, np.ndarray]
) -> Callable[[Tensor], Tensor]:
    """Return the function if gradients flow through it: a module's batch may be fixed, for one."""
    (array,) = batch.values()
    try:
        for count in (1, len(array)):
            queries = torch.from_numpy(array[:count]).float().requires_grad_()
            torch.autograd.grad(scores(queries).float().sum(), queries)
    except Exception as error:  # PyTorch has many for what does not fit
        raise Unsupported(f"that has no gradients of a batch: {one_line(error)}") from error
    return scores


def encoder_macs(coder: FrozenCoder, k: int) -> int:
    """Return the multiply-adds of E for a full group."""
    (spec,) = coder.shape.inputs
    return count_macs(lambda: coder.encode(torch.zeros(1, k, *spec.shape)))
