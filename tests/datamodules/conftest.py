from pathlib import Path

import pytest

from datamodules import remote
from tests.datamodules.pictures import write_pictures
from tests.datamodules.servers import web_server


@pytest.fixture(scope="session")
def picture_set(tmp_path_factory) -> Path:
    """100 pictures in 7 shards; do not change it."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 100, 16)


@pytest.fixture
def own_pictures(tmp_path) -> Path:
    """40 pictures in 4 shards, to be damaged."""
    return write_pictures(tmp_path / "own", 40, 10)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and little patience with servers."""
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRIVIT_CACHE_SIZE", raising=False)
    monkeypatch.setattr(remote, "PATIENT", (0.05, 0.1))
    monkeypatch.setattr(remote, "IMPATIENT", (0.05,))
    monkeypatch.setattr(remote, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 2.0)
    return tmp_path / "cache"


@pytest.fixture
def web(picture_set, cache):
    """The 100 pictures in 7 shards behind http; do not change the folder."""
    with web_server(picture_set) as server:
        yield server


@pytest.fixture
def own_web(own_pictures, cache):
    """40 pictures in 4 shards behind http, to be damaged."""
    with web_server(own_pictures) as server:
        yield server
