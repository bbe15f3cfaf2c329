"""Random numbers and visible patches that depend on integer keys alone, never on a worker, a rank or a generator.

Axes: b = images, v = views, n = patches, k = visible patches.
"""

import zlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64, which is what torch multiplies with wrap-around


def random_noise(rng: Tensor, n: int, purpose: str) -> Tensor:
    """Uniform numbers in [0, 1) of an image and a purpose, float32 [b n], the same on every device.

    Each is 24 bits of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, figure 15) over (key, purpose, patch).

    Args:
        rng: int64 [b], one key per sample (of seed, epoch and position).
        n: numbers per image.
        purpose: what they are for; two purposes are independent.
    """
    stream = _mix(rng ^ zlib.crc32(purpose.encode()))
    counter = torch.arange(1, n + 1, device=rng.device) * _GOLDEN
    bits = _mix(stream[:, None] + counter)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def view_keys(rng: Tensor, views: int) -> Tensor:
    """A key for each of several views of an image: int64 [b] -> [v b], other ones than those of the images."""
    stream = _mix(rng ^ zlib.crc32(b"view"))
    return _mix(stream + torch.arange(1, views + 1, device=rng.device)[:, None] * _GOLDEN)


def split_patches(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Which patches are seen and which hidden: int64 [b k] and [b n-k], each in ascending order of their noise.

    k = floor(n * (1 - mask_ratio)) as in MAE (arXiv:2111.06377, section 3). Equal numbers keep their order.
    """
    keep = visible_patches(noise.shape[1], mask_ratio)
    order = noise.argsort(dim=1, stable=True)
    return order[:, :keep], order[:, keep:]


def visible_patches(n: int, mask_ratio: float) -> int:
    """How many of n patches are seen."""
    return int(n * (1 - mask_ratio))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts the sign in
