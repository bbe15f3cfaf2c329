"""Going on without the file of a vocabulary: the checkpoint holds it."""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from jsonargparse import Namespace

from tasks.encoder_files import checkpoint_path, read_checkpoint
from tasks.errors import TaskError
from tasks.tokenizer import spare_vocabulary


def vocabulary_of_the_run(run: Path, config: Namespace) -> AbstractContextManager[None]:
    """Within it a task can be built without the file of its vocabulary, if a checkpoint in the folder `run` has it."""
    text = config.model.init_args.get("text")
    name = "clip" if text is None else str(text.tokenizer)
    if name == "clip" or Path(name).is_file():
        return contextlib.nullcontext()
    try:
        about = read_checkpoint(checkpoint_path(run))["trivit"]["model"]
    except (TaskError, KeyError, TypeError):
        return contextlib.nullcontext()  # nothing to go on with: the task says that the file is missing
    return spare_vocabulary(name, about.get("tokenizer_json"))
