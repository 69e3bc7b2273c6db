"""Stage 3 of the paper: the fusion encoder learns the images f⁻¹(mean z), against a discriminator.

What the published code really does is followed (its settings name other losses): hinge losses, the
mean of cosh of the pixel error, five discriminator steps to one of the generator, and a
discriminator that sees the k images with the parity image, and rates that fall along a cosine (by
step here, by epoch there).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.erase import recovered_accuracy
from codedinvnet.common.config import PixelFusionSettings
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.data import ImageSource
from codedinvnet.models.coded import CodedModel
from codedinvnet.nn.fusion import PatchDiscriminator, UNetFusion
from codedinvnet.training.fusion_data import FusionData
from codedinvnet.training.loop import Stage
from codedinvnet.training.network import embed_all
from codedinvnet.training.precision import autocast

DISCRIMINATOR = "discriminator_optimizer"
UNET_VERSION = 2
"""Of the U-Net, as `OBJECTIVE_VERSION` of the objective: 1 averaged skips in front of their
activation, and had other biases."""


class PixelStage(Stage):
    """Train E on the pixels of the generated data set (Dinh & Lee, section 3.3).

    Args:
        fusion: how to train.
        source: the images.
        model: f, E and g, of which E trains.
        data: groups and what their parity's pixels should be.
        validation: images by which the epoch is chosen.
        scheme: the model's own code, by whose recovered accuracy that is done.
        seed: of the weights that training begins with.
        part: the name of E in checkpoints.

    Raises:
        UserError: if the targets are so far from the images' range that their cosh overflows.
    """

    name = "fusion"

    def __init__(
        self,
        fusion: PixelFusionSettings,
        source: ImageSource,
        model: CodedModel,
        data: FusionData,
        validation: ImageSource,
        scheme: Scheme,
        *,
        seed: int,
        part: str = "encoder",
    ) -> None:
        farthest = data.targets.abs().max()
        if not farthest.cosh().isfinite():
            raise UserError(
                f"fusion: the targets, f⁻¹ of mean latents, reach {float(farthest):.0f} where "
                "images lie in 0..1, and their cosh overflows: nothing bounds this f's inverse. "
                "The paper's objective needs an i-ResNet (network.kind)"
            )
        self.fusion, self.source, self.model, self.data = fusion, source, model, data
        self.members, self.device = data.groups.shape[1], first_tensor(model).device
        torch.manual_seed(seed)
        self.discriminator = PatchDiscriminator(
            model.input_shape[0],
            self.members,
            filters=fusion.discriminator_filters,
            layers=fusion.discriminator_layers,
        ).to(self.device)
        model.requires_grad_(False)
        model.encoder.requires_grad_(True)
        unet = isinstance(model.encoder, UNetFusion)
        self.discriminator.apply(partial(_initialise, biases=unet))
        if unet:  # others have an initialisation of their own
            model.encoder.apply(partial(_initialise, biases=True))
        adam = partial(torch.optim.Adam, lr=fusion.learning_rate, betas=(0.0, 0.9))
        super().__init__(
            {part: model.encoder, "discriminator": self.discriminator},
            {
                "encoder_optimizer": adam(model.encoder.parameters()),
                DISCRIMINATOR: adam(self.discriminator.parameters()),
            },
            rate=fusion.learning_rate,
            epochs=fusion.epochs,
            steps_per_epoch=len(data.groups) // fusion.batch_size // fusion.discriminator_steps,
            warmup=0.0,
        )
        self.validation, self.scheme = validation, scheme
        images, _ = validation.batch(torch.arange(len(validation)))
        self.validation_latents = embed_all(model, images.to(self.device)).flatten(1).cpu()
        self.order = torch.arange(len(data.groups))

    def start_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Draw the order of the groups."""
        super().start_epoch(epoch, generator)
        self.order = torch.randperm(len(self.data.groups), generator=generator)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the images (B, k, C, H, W) and targets (B, C, H, W) of a batch of the epoch."""
        size = self.fusion.batch_size
        rows = self.order[number * size : (number + 1) * size]
        groups = self.data.groups[rows]
        images, _ = self.source.batch(groups.flatten())
        x = self.model.prepare(images.to(self.device)).unflatten(0, tuple(groups.shape))
        return x, self.data.targets[rows].to(self.device)

    def parity(self, x: Tensor) -> Tensor:
        """Return the parity images (B, C, H, W) of groups (B, k, C, H, W), in training."""
        with autocast(self.fusion.precision, self.device):
            fake: Tensor = self.model.encoder(x)
        return fake.float()

    def score(self, x: Tensor, parity: Tensor) -> Tensor:
        """Return the discriminator's scores of groups and parities, in training."""
        with autocast(self.fusion.precision, self.device):
            scores: Tensor = self.discriminator(x, parity)
        return scores.float()

    def batch_loss(self, index: int) -> Tensor:
        """Do the discriminator's steps, and return E's loss on the last batch."""
        count, optimizer = self.fusion.discriminator_steps, self.optimizers[DISCRIMINATOR]
        for turn in range(count):
            x, target = self.batch(index * count + turn)
            with torch.no_grad():
                fake = self.parity(x)
            real_score, fake_score = self.score(x, target), self.score(x, fake)
            discriminator_loss = F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean()
            optimizer.zero_grad(set_to_none=True)
            discriminator_loss.backward()
            optimizer.step()
        fake = self.parity(x)
        pixel_loss = torch.cosh(fake - target).mean()
        loss = pixel_loss - self.score(x, fake).mean()
        self.terms = {"generator": loss, "discriminator": discriminator_loss, "pixel": pixel_loss}
        return loss

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """Score by recovered accuracy on the validation images."""
        accuracy = recovered_accuracy(self.scheme, self.validation, self.validation_latents)
        return accuracy, {"validation_recovered": accuracy}


def _initialise(module: nn.Module, *, biases: bool) -> None:
    """Normal(0, 0.02) weights, as in pix2pix, and biases of 0 if those are wanted as well.

    Figures of other encoders than the U-Net are of a discriminator with PyTorch's biases.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if biases and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
