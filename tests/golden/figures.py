"""Golden figures: answers of the three bundles that no rebuilding may change.

`python -m tests.golden.figures` writes `answers.npz` again. Do that only for bundles that were
trained again, and say so in the commit.

Images: the first 300 of the samples of MNIST and Fashion-MNIST that the package has, and 300 test
images of CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; its
authors state no licence), rows 0, 33, 66 and so on of the test batch, as one lossless WebP with 20
images a row. They stay in this folder, which no wheel contains.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from codedinvnet.codes.build import scheme_for
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import load_bundle

HERE = Path(__file__).parent
ANSWERS = HERE / "answers.npz"
BUNDLES = ("mnist", "fashion", "cifar10")
SIZES = (2, 4, 10)
COUNT = 300
CIFAR10_PIXELS = "731891895ee18bfcc683a36e8f0d25161dd5808a4f450c8163abbc4b961fce78"
"""SHA-256 of CIFAR-10's 300 images, (300, 32, 32, 3) uint8."""
CIFAR10_LABELS = (
    "324934274717972174282376822697057097359275068552630684504469655627925257078"
    "875667132393415692268226464146514672470561518955928505496130249761541553286"
    "073109606649444681219140718973612573741871221119033536568491772539690390396"
    "409796328083593419386481100715747196692882993378163417568275711325335192940"
)


def images(name: str) -> tuple[Tensor, Tensor]:
    """Return 300 images (300, C, H, W), uint8, and their labels (300,)."""
    if name != "cifar10":
        return sample_images(name).batch(torch.arange(COUNT))
    with Image.open(HERE / "cifar10.webp") as sheet:
        tiles = np.asarray(sheet.convert("RGB")).reshape(15, 32, 20, 32, 3)
    pixels = np.ascontiguousarray(tiles.swapaxes(1, 2)).reshape(COUNT, 32, 32, 3)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == CIFAR10_PIXELS
    labels = torch.tensor([int(digit) for digit in CIFAR10_LABELS])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def answers(name: str) -> dict[str, Tensor]:
    """Return probabilities (300, classes): `normal`, and `k2` and so on with each member lost."""
    bundle, (pixels, _) = load_bundle(name), images(name)
    found = {}
    for k in SIZES:
        scheme = scheme_for(bundle, k)
        groups = pixels.unflatten(0, (COUNT // k, k))
        outputs = {
            task: scheme.compute(task, groups[:, list(spec.members)]).output
            for task, spec in scheme.rules.tasks(k).items()
        }
        complete = scheme.decode(outputs, k)
        found["normal"] = torch.stack([complete[i] for i in range(k)], 1).flatten(0, 1).softmax(1)
        decoded = [
            scheme.decode({task: out for task, out in outputs.items() if task != lost}, k)[lost]
            for lost in range(k)
        ]
        found[f"k{k}"] = torch.stack(decoded, 1).flatten(0, 1).softmax(1)
    return found


if __name__ == "__main__":
    arrays = {
        f"{name}_{key}": (255 * values).round().to(torch.uint8).numpy()
        for name in BUNDLES
        for key, values in answers(name).items()
    }
    np.savez_compressed(ANSWERS, **arrays)  # type: ignore[arg-type]
