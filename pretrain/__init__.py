"""One run: the `trivit` command, configuration, Trainer assembly, callbacks and checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def pretrain(config: str | Path, output: str | Path, settings: Mapping[str, Any] | None = None) -> Path:
    """What `trivit pretrain --config CONFIG --output OUTPUT --KEY VALUE ...` does; returns the folder of the run.

    Args:
        config: a YAML file, or the bare name of a shipped config such as "mae_tin40".
        output: folder of the run; an unfinished run in it goes on.
        settings: dotted keys and values, such as {"data.train": "/data/tars", "trainer.max_steps": 1000}.

    Raises:
        ValueError: (RunError, DataError, TaskError) what was given cannot work; one line says why.
        pretrain.errors.Interrupted: a signal came; a checkpoint was written first.
    """
    from pretrain.config import parse
    from pretrain.run import train

    given = {"config": config, "output": output, **(settings or {})}  # the config first: later keys override it
    return train(*parse([f"--{key}={_as_argument(value)}" for key, value in given.items()]))


def _as_argument(value: Any) -> str:
    """A Python value as the command line would have it."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
