"""Images that cannot be read now but may be another time: of how many of them a score can still tell."""

from collections.abc import Sequence

from datamodules.bad_samples import BadSample
from datamodules.manifest import Manifest
from evaluation.errors import EvaluationError

MOST_LOST = 0.01
"""Share of the images that may be missing for a reason that may pass; the score of fewer is of another set."""


def check_lost(lost: Sequence[BadSample], manifest: Manifest) -> None:
    """EvaluationError when more than `MOST_LOST` of a set's images cannot be read now."""
    if len(lost) > MOST_LOST * manifest.num_samples:
        first = f"{lost[0].shard}, {lost[0].key}: {lost[0].reason}"
        raise EvaluationError(
            f"{len(lost)} of {manifest.num_samples} images of {manifest.name} cannot be read now (first: {first})"
            f", and a score without them would be of another set: run the same command again, or see "
            f"`trivit shards verify {manifest.name}`"
        )
