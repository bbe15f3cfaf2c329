"""95% confidence intervals by resampling the test images (Efron 1979, percentile bootstrap), for what is no proportion.

Axes: t = test images, k = sums that a score is made of, r = resamples.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
_BLOCK_BYTES = 64 << 20

Doubles = NDArray[np.float64]


def resampled_sums(values: NDArray[Any], seed: int = 0, resamples: int = RESAMPLES) -> Doubles:
    """Sums over as many images drawn with replacement: values [t k] -> [r k], the same for a seed."""
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    count = len(values)
    rows = max(1, _BLOCK_BYTES // (8 * count))
    even = np.full(count, 1 / count)
    blocks = [
        rng.multinomial(count, even, size=min(rows, resamples - start)).astype(np.float64) @ values
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(blocks)


def percentile_interval(samples: Doubles) -> list[float]:
    """The middle 95% of what a score is on the resamples [r]."""
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return [round(float(low), 6), round(float(high), 6)]
