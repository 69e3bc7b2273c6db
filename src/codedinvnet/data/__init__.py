"""Image sets: where they are found, how they are read, and how they are split and grouped.

`load.py` opens them by name: `finding.py` looks for them, `download.py` fetches them, and
`formats.py` reads .npz, idx and CIFAR-10 files. `sources.py` holds what they are read into,
`names.py` what is known of a set by its name, and `groups.py` the validation split and the coding
groups.
"""

from __future__ import annotations

from codedinvnet.data.groups import (
    Groups,
    random_groups,
    settings_split,
    split_indices,
    spread_rows,
)
from codedinvnet.data.load import SAMPLES, load_images, sample_images
from codedinvnet.data.sources import ImageFolder, ImageRows, ImageSet, ImageSource, Split

__all__ = [
    "SAMPLES",
    "Groups",
    "ImageFolder",
    "ImageRows",
    "ImageSet",
    "ImageSource",
    "Split",
    "load_images",
    "random_groups",
    "sample_images",
    "settings_split",
    "split_indices",
    "spread_rows",
]
