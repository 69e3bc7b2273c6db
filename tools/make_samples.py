"""Write the sample images that ship in the package: 1,000 of each test split, chosen at random.

    python tools/make_samples.py data

needs the whole image sets in the folder named, in any layout that `load_images` reads.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch

from codedinvnet.cli.common import guarded
from codedinvnet.data import SAMPLES, load_images
from codedinvnet.files import write_atomically

COUNT = 1000
SEED = 0
TARGET = Path(__file__).resolve().parent.parent / "src" / "codedinvnet" / "samples"


def write_samples(data_dir: Path, target: Path) -> None:
    """Write one file for each image set.

    Args:
        data_dir: Where the whole image sets are.
        target: Folder for the files, `<name>.npz`.

    Raises:
        UserError: If an image set is not found.
    """
    for name in SAMPLES:
        whole = load_images(name, "test", data_dir=data_dir)
        generator = torch.Generator().manual_seed(SEED)
        chosen = torch.randperm(len(whole), generator=generator)[:COUNT].sort().values
        images, labels = whole.batch(chosen)
        path, content = target / f"{name}.npz", io.BytesIO()
        np.savez_compressed(
            content,
            images=images[:, 0].numpy(),
            labels=labels.numpy().astype(np.uint8),
            classes=np.array(whole.classes),
            indices=chosen.numpy(),
        )
        write_atomically(path, content.getvalue())
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data_dir", type=Path, help="folder with the whole image sets")
    data_dir: Path = parser.parse_args().data_dir
    return guarded(lambda: write_samples(data_dir, TARGET))


if __name__ == "__main__":
    sys.exit(main())
