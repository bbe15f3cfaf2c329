"""Going on without the file of a vocabulary: the checkpoint holds it."""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from jsonargparse import Namespace

from pretrain.checkpoint_files import LAST, PART, PREVIOUS
from tasks.encoder_files import checkpoint_path, read_checkpoint
from tasks.errors import TaskError
from tasks.tokenizer import spare_vocabulary


def vocabulary_of_the_run(run: Path, config: Namespace) -> AbstractContextManager[None]:
    """Within it a task can be built without the file of its vocabulary.

    A checkpoint in the folder `run` has it, or the one that the run starts from.
    """
    settings = config.model.init_args
    text = settings.get("text")
    name = "clip" if text is None else str(text.tokenizer)
    if name == "clip" or Path(name).is_file():
        return contextlib.nullcontext()
    own = (run / "checkpoints" / name for name in (LAST, PART, PREVIOUS))  # the newest may be damaged
    for source in (*own, settings.get("init_checkpoint")):
        with contextlib.suppress(TaskError, KeyError, TypeError):  # nothing there: the task misses the file
            return spare_vocabulary(name, read_checkpoint(checkpoint_path(source))["trivit"]["model"]["tokenizer_json"])
    return contextlib.nullcontext()
