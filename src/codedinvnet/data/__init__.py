"""Image sets: `load.py` finds them by name and reads their files into `sources.py`.

`groups.py` has the validation split and the coding groups.
"""

from __future__ import annotations

from codedinvnet.data.groups import (
    Groups,
    random_groups,
    settings_split,
    split_images,
    split_indices,
    spread_rows,
)
from codedinvnet.data.load import SAMPLES, cache_dir, load_images, sample_images
from codedinvnet.data.sources import ImageRows, ImageSet, ImageSource, Split

__all__ = [
    "SAMPLES",
    "Groups",
    "ImageRows",
    "ImageSet",
    "ImageSource",
    "Split",
    "cache_dir",
    "load_images",
    "random_groups",
    "sample_images",
    "settings_split",
    "split_images",
    "split_indices",
    "spread_rows",
]
