"""Images that all lie in one class folder: packing cannot tell its name from that of any folder, evaluation may."""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from datamodules.errors import DataError
from datamodules.sources import list_source
from evaluation.features import Features


def only_folder(path: str | os.PathLike[str]) -> str:
    """Name of the one folder that directly holds all images of a plain folder or tar; "" where there is none."""
    try:
        source = list_source(path)
    except DataError:  # shards, say, which do not tell
        return ""
    nested = any("/" in source.inner_name(image) for image in source.images)
    return "" if nested else source.prefix.rstrip("/").rpartition("/")[2]


def with_only_folder(images: Features, path: str | os.PathLike[str], classes: Sequence[str]) -> Features:
    """`images` of `path`, all of the class that their one folder is called after, if `classes` of train know it.

    Images with a label, or in a folder of another name, come back as they are.
    """
    if not classes or (images.label >= 0).any() or (name := only_folder(path)) not in classes:
        return images
    return replace(images, label=np.zeros_like(images.label), classes=(name,))
