"""Random numbers that follow from integer keys alone, so that they are the same on every rank, worker and machine.

A sample's key is a hash of (seed, epoch, position); what it is used for (crop, flip, ...) is a second word. The mixer
is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195). It is written out here because
the streams of numpy's and torch's generators may change between versions, and a run must survive an upgrade.

Axes: b = samples, n = numbers for each of them.
"""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble each 64-bit word one-to-one: every input bit moves about half of the output bits."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def word(*parts: int) -> int:
    """Hash integers of any sign and size to one 64-bit word; the order of the parts matters."""
    state = 0
    for part in parts:
        state = (state + _GOLDEN) & _MASK
        while True:  # 64 bits at a time: a seed may be larger than a word
            state = _mix_one(state ^ (part & _MASK))
            part >>= 64
            if part in (0, -1):
                break
    return state


def _mix_one(state: int) -> int:
    """`mix` of a single word: arrays of one element are thirty times slower than integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)


def words(key: int, index: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash a key with each index -> uint64, the shape of `index`."""
    return mix(mix(index.astype(np.uint64) + np.uint64(_GOLDEN)) ^ np.uint64(key & _MASK))


def sample_keys(seed: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Key of each position of an epoch: 63 bits, so that torch's int64 holds it. [b] -> [b]."""
    return (words(word(seed, epoch, 1), positions) >> np.uint64(1)).astype(np.int64)


def uniform(keys: NDArray[np.int64], purpose: int, n: int) -> NDArray[np.float64]:
    """Draw `n` numbers in [0, 1) for each key; other purposes give independent numbers. [b] -> [b n]."""
    counters = (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(word(purpose))
    state = mix(keys.astype(np.uint64) + np.uint64(_GOLDEN))
    return (mix(state[:, None] ^ mix(counters)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
