"""Writing a checkpoint on all ranks: one on which it fails must not leave the others waiting for it."""

from pathlib import Path

from lightning.pytorch import Trainer


def save_together(trainer: Trainer, path: Path) -> None:
    """Collective: `trainer.save_checkpoint`, whose end a rank that cannot write comes to as well.

    Raises:
        Exception: whatever kept this rank from writing; it is for the caller to tell the others.
    """
    try:
        trainer.save_checkpoint(path)
    except Exception:  # a full disk is an OSError; torch's writer and a host without memory raise other ones
        trainer.strategy.barrier("Trainer.save_checkpoint")
        raise


def reason(error: Exception) -> str:
    """Why a file could not be written, in a few words."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    first = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
