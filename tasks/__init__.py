"""What is learned: encoders, MAE, losses, schedules and the thin LightningModules around them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.encoder_files import load_encoder

__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    if name == "load_encoder":  # torch and timm take seconds to import, and not every importer of this room needs them
        from tasks.encoder_files import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
