"""How good an encoder is: features, probes, pictures and the report."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.score import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # torch takes seconds to import, and not every importer of this room needs it
        from evaluation.score import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
