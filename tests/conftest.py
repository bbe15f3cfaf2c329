"""Recorded numbers of the original authors' code, for any room's tests.

A test marked `@pytest.mark.golden("mae_model")` with an argument `golden` runs once per variant of that fixture, found
by globbing tests/golden (or $TRIVIT_GOLDEN instead), and takes every size from the fixture's json.
"""

import json
import os
import signal
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

# A shell that starts us in the background ignores Ctrl-C for us and for all that we start, some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(os.environ.get("TRIVIT_GOLDEN") or Path(__file__).parent / "golden")


class Golden:
    """One variant of one fixture: its json, and its arrays read when first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: dict[str, Any] = json.loads(path.read_text())
        self.config: dict[str, Any] = self.about.get("config", {})
        self.values: dict[str, Any] = self.about.get("values", {})

    @cached_property
    def tensors(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.path.with_name(self.about["file"]))

    def group(self, prefix: str) -> dict[str, Any]:
        """Tensors whose name begins with `prefix`, without it; floating ones in float64 (their float32 is exact)."""
        found = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(name): runs once per recorded variant of that fixture")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    paths = sorted(GOLDEN.glob(f"{marker.args[0]}_*.json"))
    paths = [path for path in paths if json.loads(path.read_text())["fixture"] == marker.args[0]]
    if not paths and "TRIVIT_GOLDEN" not in os.environ:
        raise pytest.UsageError(f"no recorded numbers named {marker.args[0]} in {GOLDEN}")
    metafunc.parametrize("golden", [Golden(path) for path in paths], ids=[path.stem for path in paths])
