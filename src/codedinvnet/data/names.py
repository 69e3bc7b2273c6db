"""The image sets that are known by name, and which of them a mistyped name may mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from codedinvnet.errors import nearest


@dataclass(frozen=True)
class Known:
    """What is known of an image set by its name."""

    classes: tuple[str, ...]
    dataset: str  # class in torchvision.datasets
    folder: str  # where torchvision puts its files, below its root
    aliases: tuple[str, ...] = ()


KNOWN = {
    "mnist": Known(tuple("0123456789"), "MNIST", "MNIST/raw"),
    "fashion": Known(
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        "FashionMNIST",
        "FashionMNIST/raw",
        aliases=("fashion-mnist",),
    ),
    "cifar10": Known(
        (
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        "CIFAR10",
        "cifar-10-batches-py",
    ),
}


def canonical(name: str) -> str:
    """Return the one name of an image set that goes by several."""
    return next((known for known, facts in KNOWN.items() if name in facts.aliases), name)


def spellings(name: str) -> tuple[str, ...]:
    """Return every name that an image set goes by."""
    return (name, *KNOWN[name].aliases) if name in KNOWN else (name,)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return a hint for an error message, if an option is close to the name; else ""."""
    near = nearest(name, options)
    return f" (did you mean {near!r}?)" if near is not None else ""
