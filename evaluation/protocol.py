"""What stands beside a number: what all probes of one evaluation share, and what each did in its own way."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

OF_SCORED = ("source", "checkpoint", "encoder", "versions")
"""What is of the encoder that is scored and of this evaluation, not of a floor, which may be from the cache."""


def protocol_of(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Own words go before shared ones; what is None in them does not hold of this probe and is left out."""
    return {name: value for name, value in {**shared, **own}.items() if value is not None}


def floor_protocol(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a floor, which is of another encoder, and names the versions that made it itself."""
    return protocol_of({name: value for name, value in shared.items() if name not in OF_SCORED}, own)


def versions() -> dict[str, str]:
    """Of what makes numbers here and now."""
    return {"trivit": version("trivit"), "torch": torch.__version__}
