"""Files beside the data: whole or absent, in the cache when there is no other way."""

import errno
import os
from pathlib import Path

import pytest

from datamodules.errors import DataError
from datamodules.sidecars import cache_home, locked, read_sidecar, sidecar_places, write_aside, write_sidecar


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_has_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_home() == tmp_path / "cache"
    monkeypatch.delenv("TRIVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "trivit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "trivit"


def test_write_aside_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_aside(tmp_path / "a", b"old")

    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_aside(tmp_path / "a", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_read_only_folders(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    target = tmp_path / "data" / "x.idx"
    target.parent.mkdir()
    refuse(monkeypatch, target.parent, code)
    place = write_sidecar(target, b"1")
    assert place == sidecar_places(target)[1]
    assert place.is_relative_to(cache)
    assert read_sidecar(target) == [(place, b"1")]
    refuse(monkeypatch, place.parent, code)
    with pytest.raises(DataError, match=r"is read-only, and so: no permission to write .*TRIVIT_CACHE"):
        write_sidecar(target, b"2")


def test_a_full_disk_does_not_fall_back(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, tmp_path, errno.ENOSPC)
    with pytest.raises(DataError, match="is full: free some space"):
        write_sidecar(tmp_path / "x.idx", b"1")
    assert not cache.exists()


def test_folders_of_one_name_have_their_own_place(tmp_path: Path) -> None:
    assert sidecar_places(tmp_path / "a" / "x")[1] != sidecar_places(tmp_path / "b" / "x")[1]


def test_a_lock_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / ".lock", wait=False):
            assert (tmp_path / ".lock").exists()


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
    real = Path.open

    def guarded(self: Path, mode: str = "r", *args: object, **options: object) -> object:
        if "x" in mode and self.parent == folder:
            raise OSError(code, os.strerror(code))
        return real(self, mode, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", guarded)
