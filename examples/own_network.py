"""A small network of one's own on scikit-learn's digits, a code for it, and two rivals."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

import codedinvnet as ci

K = 4


def main(epochs: int = 20) -> None:
    """Print how often late answers are right when one of four workers is missing."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images * 255 / 16).to(torch.uint8)[:, None]  # (N, 1, 8, 8)
    labels, names = torch.from_numpy(digits.target), tuple("0123456789")
    train = ci.ImageSet("digits", names, pixels[:1300], labels[:1300])
    test = ci.ImageSet("digits", names, pixels[1300:], labels[1300:])

    torch.manual_seed(0)
    f = ci.IResNet((1, 8, 8), blocks=(2, 2), strides=(1, 2), hidden=(32, 32), coefficient=0.8)
    model = ci.CodedModel(f, ci.LeanFusion(1, width=16), image_shape=(1, 8, 8), classes=names)
    network = ci.TrainSettings(epochs=epochs, batch_size=64, learning_rate=3e-3)
    code = ci.RecoveryFusionSettings(members=K, epochs=2, joint_epochs=epochs, steps_per_epoch=25)
    backup = ci.PartSettings(epochs=epochs, steps_per_epoch=40)
    schemes = [
        ci.fit("coded-invnet", model, train, code, k=K, network=network),
        ci.fit("small-backup", model, train, backup, k=K),
        ci.fit("approxifer", model, train, k=K),
    ]
    print("method        normal  recovered")
    for scheme in schemes:
        found = ci.evaluate(scheme, test, k=K, progress=False)
        print(f"{scheme.name:<14}{found.normal_accuracy:6.1%}{found.recovered_accuracy:11.1%}")


if __name__ == "__main__":
    main()
