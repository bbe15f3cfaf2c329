"""Memory for a batch of images that a loader worker hands over without a copy.

Axes: b = images, c = channels, h, w = rows and columns.
"""

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from datamodules.lent_memory import Borrower


def empty_images(b: int, c: int, h: int, w: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Make an uninitialised [b c h w], channels innermost; in shared memory when called in a loader worker."""
    strides = (h * w * c, 1, w * c, c)
    if get_worker_info() is None:
        return torch.empty_strided((b, c, h, w), strides, dtype=dtype)
    # As torch's default collate does: the batch is written where the main process will read it.
    if Borrower.here is not None and (memory := Borrower.here.borrow(b * c * h * w * dtype.itemsize)) is not None:
        return memory.view(dtype).as_strided((b, c, h, w), strides)
    storage = torch.UntypedStorage._new_shared(b * c * h * w * dtype.itemsize)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage, 0, (b, c, h, w), strides)
