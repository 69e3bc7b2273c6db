"""A backup and a code in one head: what a small network says of a member, beside its latent."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from codedinvnet.codes.backup import backup_network
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.equal_cost import macs, served_macs, width_within
from codedinvnet.codes.mean import MeanCode
from codedinvnet.codes.method import ONE, Given, Lessons, Method, Tolerance
from codedinvnet.codes.rules import SERVED, CodeRules, Costs, Parities
from codedinvnet.data import spread_rows
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import CodedModel, decode_each, with_encoder
from codedinvnet.models.network import embedding_of
from codedinvnet.nn.fusion import Encoding, FusionEncoder, weighted_mean
from codedinvnet.nn.head import RecoveryHead
from codedinvnet.nn.resnet import ResNet

if TYPE_CHECKING:
    from codedinvnet.training.loop import Stage

HIDDEN = 256
"""Of the head, around a bundle whose recovery head has no hidden layer."""


class BackedMean(FusionEncoder):
    """The average image, with a small backup's features of each member beside it.

    Args:
        backup: a classifier of padded images, whose own last layer is left out.
    """

    def __init__(self, backup: ResNet) -> None:
        super().__init__()
        self.side_features = backup.features
        backup.classify = nn.Identity()
        self.backup = backup

    def encode(self, x: Tensor, weights: Tensor) -> Encoding:
        side = self.backup(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return Encoding(weighted_mean(x, weights), side)


class BackupAndCode(Method):
    """The average image's parity around a bundle's f, and a small backup, in one recovery head.

    The extra worker embeds the average image and runs the backup on all members, for what f leaves
    of the cost. The head answers from the decoded latent and the backup's features together, or,
    where several members are missing, from these features alone. f and g stay as they are.
    """

    name = "backup-and-code"
    of_bundle = True
    part = "backup"
    version = 2
    cost = 1.4

    def rules(
        self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None
    ) -> CodeRules:
        return Parities(k, guesses=True, cost=Costs(group=1.0, member=(self.cost - 1) / k))

    def check(self, k: int, shape: tuple[int, ...], bundle: BundleInfo | None) -> None:
        super().check(k, shape, bundle)
        if self.cost <= 1:
            raise UserError(f"{self.name}: f alone costs 1, so that nothing is left for a backup")

    def made_with(self, given: Given, settings: Any) -> Mapping[str, Any]:
        model = given.coded
        left = int(self.cost * served_macs(model)) - macs(model.network, model)
        return {"width": width_within(lambda w: backup_network(model, w), model, left // given.k)}

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        model = given.coded
        encoder = BackedMean(backup_network(model, int(made_with["width"])))
        head = RecoveryHead(
            model.latent_shape,
            given.classes,
            hidden=model.settings.head_hidden or HIDDEN,
            side_features=encoder.side_features,
        )
        return nn.ModuleDict({"encoder": encoder, "head": head})

    def stage(self, part: nn.Module, given: Given, lessons: Lessons) -> Stage:
        model = self._joined(part, given)
        embed = embedding_of(model)
        rows = spread_rows(lessons.train_rows, 1024)
        with torch.no_grad():
            images = lessons.train.batch(rows)[0].to(lessons.device)
            cast(RecoveryHead, model.recovery_head).norm.initialise(embed(images))

        return lessons.members_stage(part, partial(answer_all, model), given.k)

    def build(self, given: Given) -> Scheme:
        assert given.part is not None
        model = self._joined(given.part, given)
        served = {SERVED: embedding_of(model)}
        return self.scheme(MeanCode(model, given.k), given, **served)

    def _joined(self, part: nn.Module, given: Given) -> CodedModel:
        parts = cast(nn.ModuleDict, part)
        model = with_encoder(given.coded, parts["encoder"])
        model.recovery_head = cast(RecoveryHead, parts["head"])
        return model


def answer_all(model: CodedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return every member's logits as if it alone were missing, and those without a latent.

    Args:
        model: f, g, the backup and the head.
        images: of groups, (B, k, C, H, W).
    """
    batch, k = images.shape[:2]
    side = model.fuse(images).side.float().flatten(0, 1)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        both = torch.cat([images.flatten(0, 1), images.mean(dim=1)])
        embedded = model.network(model.prepare(both)).flatten(1)
        latents, parity = embedded[: batch * k].unflatten(0, (batch, k)), embedded[batch * k :]
        decoded = decode_each(parity, latents).view(batch * k, *model.latent_shape)
    with torch.autocast(images.device.type, enabled=False):
        found = model.recover(decoded, side, k), model.recover_from_side(side)
    return found[0].unflatten(0, (batch, k)), found[1].unflatten(0, (batch, k))
