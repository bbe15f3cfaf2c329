from pathlib import Path

import pytest

from tests.datamodules.pictures import write_pictures


@pytest.fixture(scope="session")
def picture_set(tmp_path_factory) -> Path:
    """100 pictures in 7 shards; do not change it."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 100, 16)


@pytest.fixture
def own_pictures(tmp_path) -> Path:
    """40 pictures in 4 shards, to be damaged."""
    return write_pictures(tmp_path / "own", 40, 10)
