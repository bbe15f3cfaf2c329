"""Whole DINO states, student, teacher, heads and centre, from files: ours and the authors'."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tasks.dino import DINO
from tasks.encoder_files import checkpoint_path, load_strictly, read_checkpoint
from tasks.errors import TaskError

State = dict[str, Tensor]
CENTER = "dino_targets.center"
CENTERS = (CENTER, "ibot_targets.center")  # Sinkhorn-Knopp has none
OF_IBOT = ("student.mask_token", "teacher.mask_token", "ibot_targets.center")
"""What iBOT with the head of the class tokens adds to a DINO."""


def read_dino(source: str | Path) -> tuple[dict[str, Any] | None, State]:
    """What a file says about its DINO (None: the authors' say nothing), and its weights under our names.

    Args:
        source: a run's directory, a Lightning checkpoint of DINOTask, or the authors' full checkpoint
            ({"student", "teacher", "dino_loss"}).

    Raises:
        TaskError: it is none of these.
    """
    content = read_checkpoint(checkpoint_path(source))
    if not isinstance(content, Mapping) or "trivit" not in content:
        return None, authors_state(content, str(source))
    about = content["trivit"]
    if about["objective"] != "dino":
        raise TaskError(f"{source} is a {about['objective']} run: take its encoder, with init_encoder")
    return about, {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}


def fill_dino(model: DINO, state: State, source: str | Path) -> None:
    """Loads what `read_dino` gave; TaskError lists keys that are missing or unexpected.

    Centres that the model has no use for are left out. A DINO without iBOT may start one that has the same head for
    patches: mask tokens and the patches' centre stay as they are in the model.
    """
    own = model.state_dict()
    state = {name: value for name, value in state.items() if name in own or name not in CENTERS}
    if not any(name in state for name in OF_IBOT):
        state |= {name: own[name] for name in OF_IBOT if name in own}
    load_strictly(model, state, str(source))


def authors_state(content: Any, source: str) -> State:
    """The authors' full checkpoint under our names; TaskError when it is something else."""
    if not isinstance(content, Mapping) or not {"student", "teacher", "dino_loss"} <= content.keys():
        raise TaskError(
            f"{source} is no full DINO checkpoint (student, teacher, dino_loss); for a backbone alone use init_encoder"
        )
    state = {f"{who}.{our_name(k)}": v for who in ("student", "teacher") for k, v in content[who].items()}
    return {**state, CENTER: content["dino_loss"]["center"]}


def our_name(name: str) -> str:
    """A parameter's name under the authors' MultiCropWrapper (in DDP or not) -> its name in a Branch."""
    name = name.removeprefix("module.")
    return f"encoder.trunk.{name.removeprefix('backbone.')}" if name.startswith("backbone.") else name
