"""`trivit evaluate` under torchrun: every process takes its part of the images, the first one does the rest."""

import os
from typing import Any

from datamodules.open_shards import open_shards
from evaluation.features import assist
from evaluation.score import evaluate
from evaluation.team import gather_team


def evaluate_together(
    source: str, *, train: str | os.PathLike[str] | None = None, test: str | os.PathLike[str], **options: Any
) -> dict[str, Any]:
    """Collective where several processes were started together: `evaluate`; {} on all but the first process."""
    with gather_team() as team:
        if team.rank == 0:
            return evaluate(source, train=train, test=test, team=team, **options)
        for data in (train, test):
            if data is not None:
                open_shards(data)  # on each node: remote shards have their place in its cache
        assist(team)
        return {}
