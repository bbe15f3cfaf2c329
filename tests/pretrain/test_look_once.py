"""Ranks of one node tell each other what they have found on the disk."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain import checkpoint_files
from pretrain import look_once as module
from pretrain.checkpoint_files import LAST, PREVIOUS, find_checkpoint
from pretrain.look_once import look_once
from tests.pretrain.test_checkpoint_files import cut, spoilt_files, write


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of a node, as a rank sees it."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("LOCAL_RANK", "0")
    return folder


def counting(path: Path, found: str | None = "damaged") -> tuple[list[int], Callable[[], str | None]]:
    looks: list[int] = []

    def look() -> str | None:
        looks.append(1)
        time.sleep(0.05)
        return found

    return looks, lambda: look_once(path, look)


@pytest.mark.parametrize("found", ["damaged", None])
def test_one_rank_of_a_node_looks_and_the_others_hear_of_it(found: str | None, place: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    looks, ask = counting(tmp_path / "x", found)
    with ThreadPoolExecutor(4) as ranks:  # a lock is of an open file, so threads are as good as processes
        assert list(ranks.map(lambda _: ask(), range(4))) == [found] * 4
    assert len(looks) == 1
    (note,) = (place / f"trivit-{os.getuid()}").iterdir()
    assert note.stat().st_mode & 0o077 == 0


def test_what_has_changed_or_is_of_an_earlier_start_is_looked_at_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "shard").write_text("x")
    looks, ask = counting(tmp_path / "x")
    ask()
    (tmp_path / "x" / "shard").write_text("y")
    ask()
    (tmp_path / "x" / "more").write_text("x")
    ask()
    ask()
    assert len(looks) == 3
    monkeypatch.setattr(module, "STARTED", time.time() + 1)
    ask()
    assert len(looks) == 4


def test_without_a_launcher_a_note_or_a_place_for_it_each_looks(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("x")
    looks, ask = counting(tmp_path / "x")
    ask()
    (note,) = (place / f"trivit-{os.getuid()}").iterdir()
    told = json.loads(note.read_text())
    for half in ("", note.read_text()[:-5], "[]", json.dumps({"state": told["state"]})):
        note.write_text(half)
        assert ask() == "damaged"
    assert len(looks) == 5
    note.parent.chmod(0o777)  # others may have written it
    note.write_text(json.dumps(told | {"found": None}))
    assert ask() == "damaged" and len(looks) == 6
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert ask() == "damaged" and len(looks) == 7
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    ask()
    ask()
    assert len(looks) == 9


def test_ranks_read_the_bytes_of_a_checkpoint_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = tmp_path / "run", list[str]()
    run.mkdir()
    for step, name in enumerate((PREVIOUS, LAST), start=1):
        write(run / name, step, "folder")
    cut(spoilt_files(run / LAST)[-1], 0.5)
    damage = checkpoint_files.damage

    def counted(path: Path) -> str | None:
        read.append(path.name)
        return damage(path)

    monkeypatch.setattr(checkpoint_files, "damage", counted)
    told = [find_checkpoint(run) for _ in range(3)]
    assert told[0][0] == run / PREVIOUS and told == [told[0]] * 3
    assert read == [LAST, PREVIOUS]
