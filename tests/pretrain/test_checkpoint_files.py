"""What is left of a checkpoint when its writing is cut off or its bytes are spoiled."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint_files, checkpoints
from pretrain.checkpoint_files import LAST, PART, PREVIOUS, damage, find_checkpoint, put_in_place, remove
from pretrain.checkpoints import read_checkpoint as read_run_checkpoint
from pretrain.errors import RunError
from tasks.encoder_files import checkpoint_path, read_checkpoint
from tasks.errors import TaskError
from tasks.sharded_files import ABOUT, read_sharded, save_about, save_flushed, save_shard, shard_name, whole
from tests.pretrain.conftest import pretrain

KINDS = ("file", "folder")


def write(path: Path, step: int, kind: str) -> None:
    """A checkpoint of some kilobytes."""
    remove(path)
    rows = torch.arange(600.0).view(60, 10) + step
    if kind == "file":
        save_flushed({"global_step": step, "state_dict": {"w": rows}}, path)
        return
    path.mkdir()
    cuts = {shard_name(0): (0, rows[:31].clone()), shard_name(1): (31, rows[31:].clone())}
    sizes = {name: save_shard({"/state_dict/w": part}, f"save {step}", path / name) for name, part in cuts.items()}
    note = {"trivit.sharded": "/state_dict/w", "shape": [60, 10], "dtype": torch.float32}
    save_about({"global_step": step, "state_dict": {"w": note}}, sizes, f"save {step}", path)


def read(path: Path) -> int:
    state = whole(read_sharded(path)) if path.is_dir() else torch.load(path, weights_only=True)
    assert torch.equal(state["state_dict"]["w"], torch.arange(600.0).view(60, 10) + state["global_step"])
    return int(state["global_step"])


SAVE = """
import os, signal, sys
from pathlib import Path
import tasks.sharded_files as files
import pretrain.checkpoint_files as checkpoints
from tests.pretrain.test_checkpoint_files import write
folder, kind, what, at = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
written = 0
def killed(action, which="name"):
    if which != what:
        return action
    def act(*args):
        global written
        if written >= at:
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        return action(*args)
    return act
class Killing(files._Telling):
    write = killed(files._Telling.write, "write")
files._Telling = Killing
for name in ("rename", "replace"):
    setattr(Path, name, killed(getattr(Path, name)))
os.link, checkpoints.shutil.rmtree = killed(os.link), killed(checkpoints.shutil.rmtree)
for step in (3, 4):
    write(folder / checkpoints.PART, step, kind)
    checkpoints.put_in_place(folder / checkpoints.PART)
print("whole")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_write_or_rename_leaves_the_newest_whole_checkpoint(kind: str, tmp_path: Path) -> None:
    """Forked children, since torch takes long to import: at every link, rename and removal, and at some writes."""
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder / LAST, 2, kind)
    write(folder / PREVIOUS, 1, kind)
    forks = f"""
import os, sys, shutil
from pathlib import Path
sys.path.insert(0, {str(Path.cwd())!r})
import torch
import pretrain.checkpoint_files
import tests.pretrain.test_checkpoint_files
base, ended = Path(sys.argv[1]), False
for what, at in [("write", at) for at in range(0, 1000, 7)] + [("name", at) for at in range(1000)]:
    if what == "write" and ended:
        continue
    copy = base.with_name(f"killed{{what}}{{at:04d}}")
    shutil.copytree(base, copy)
    child = os.fork()
    if not child:
        sys.argv = ["", str(copy), {kind!r}, what, str(at)]
        try:
            exec({SAVE!r}, {{"__name__": "child"}})
        finally:
            os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    if ended and what == "name":
        break
"""
    done = subprocess.run([sys.executable, "-c", forks, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for what, most in (("write", 10), ("name", 3)):
        copies, newest = sorted(tmp_path.glob(f"killed{what}*")), []
        for copy in copies:
            path, findings = find_checkpoint(copy)
            assert path is not None and not findings
            newest.append(read(path))
        assert len(newest) > most and newest == sorted(newest) and set(newest) == {2, 3, 4}
        assert read(copies[-1] / LAST) == 4 and read(copies[-1] / PREVIOUS) == 3 and not (copies[-1] / PART).exists()


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def flip(path: Path, share: float) -> None:
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * share))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))


def spoilt_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.iterdir())


@pytest.mark.parametrize("spoil", [cut, flip])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_wherever_it_matters(kind: str, spoil: Callable[[Path, float], None], tmp_path: Path) -> None:
    """A byte that no checksum covers (a date, padding) may change, if what is read stays the same."""
    found = total = 0
    write(tmp_path / LAST, 2, kind)
    assert damage(tmp_path / LAST) is None
    for i, name in enumerate(file.name for file in spoilt_files(tmp_path / LAST)):
        for share in (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97):
            copy = tmp_path / f"copy{i}{share}" / LAST
            copy.parent.mkdir()
            write(copy, 2, kind)
            spoil(copy if kind == "file" else copy / name, share)
            total += 1
            if damage(copy) is not None:
                found += 1
            else:
                assert spoil is flip and read(copy) == 2
    assert found == total if spoil is cut else found > total // 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_newest_gives_way_to_the_one_before(kind: str, tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == (None, [])
    write(tmp_path / PREVIOUS, 1, kind)
    write(tmp_path / LAST, 2, kind)
    cut(spoilt_files(tmp_path / LAST)[-1], 0.5)
    path, (finding,) = find_checkpoint(tmp_path)
    assert path == tmp_path / PREVIOUS and finding.startswith(f"{tmp_path / LAST} is damaged (")
    write(tmp_path / PART, 3, kind)
    put_in_place(tmp_path / PART, keep=False)
    assert read(tmp_path / LAST) == 3 and read(tmp_path / PREVIOUS) == 1
    for name in (LAST, PREVIOUS):
        cut(spoilt_files(tmp_path / name)[0], 0.9)
    with pytest.raises(RunError, match=r"last.ckpt is damaged .*previous.ckpt is damaged .*restore a copy"):
        find_checkpoint(tmp_path)


def test_what_the_disk_does_not_let_us_see_is_damaged_and_not_nothing(tmp_path: Path) -> None:
    (tmp_path / LAST).symlink_to(LAST)
    with pytest.raises(RunError, match=r"last.ckpt is damaged .*Too many levels"):
        find_checkpoint(tmp_path)
    write(tmp_path / PREVIOUS, 1, "file")
    assert find_checkpoint(tmp_path)[0] == tmp_path / PREVIOUS


def test_shards_of_two_saves_are_no_checkpoint(tmp_path: Path) -> None:
    for step, name in ((1, PREVIOUS), (2, LAST)):
        write(tmp_path / name, step, "folder")
    shutil.copy(tmp_path / PREVIOUS / shard_name(1), tmp_path / LAST / shard_name(1))
    path, findings = find_checkpoint(tmp_path)
    assert path == tmp_path / PREVIOUS and findings == [
        f"{tmp_path / LAST} is damaged (shard_00001.pt is of another save than about.pt)"
    ]
    with pytest.raises(TaskError, match=r"last.ckpt: it is damaged .*; the one before is .*previous"):
        read_checkpoint(tmp_path / LAST)


def test_a_folder_of_an_earlier_version_without_the_id_of_a_save_is_read(tmp_path: Path) -> None:
    write(tmp_path / LAST, 1, "folder")
    for file in (tmp_path / LAST).iterdir():
        content = torch.load(file, weights_only=True)
        del content["trivit.save"]
        torch.save(content, file)
    about = torch.load(tmp_path / LAST / ABOUT, weights_only=True)
    about["shards"] = {name: (tmp_path / LAST / name).stat().st_size for name in about["shards"]}
    torch.save(about, tmp_path / LAST / ABOUT)
    assert damage(tmp_path / LAST) is None and read(tmp_path / LAST) == 1


@pytest.mark.parametrize(("old", "new"), [KINDS, KINDS[::-1]])
def test_one_kind_takes_the_place_of_the_other(old: str, new: str, tmp_path: Path) -> None:
    for step, kind in enumerate((old, new, old), start=1):
        write(tmp_path / PART, step, kind)
        put_in_place(tmp_path / PART)
    assert read(tmp_path / LAST) == 3 and read(tmp_path / PREVIOUS) == 2


def test_a_full_disk_is_an_oserror(tmp_path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (0, 100, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(OSError) as caught:
                save_flushed({"w": torch.zeros(10_000)}, tmp_path / "x")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.errno == errno.EFBIG


def test_a_run_goes_on_from_the_checkpoint_before_and_says_so(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    more = [*small, "--checkpoint_every", 3]
    assert pretrain(*more, "--output", run) == 0
    shutil.copytree(run, copy)
    flip(copy / "checkpoints" / LAST, 0.5)
    capsys.readouterr()
    assert pretrain(*more, "--output", copy) == 0
    said = capsys.readouterr()
    assert "last.ckpt is damaged (last.ckpt: wrong checksum" in said.err and f"{PREVIOUS}\n" in said.err
    assert "at step 6 of 8" in said.out
    states = [torch.load(path / "checkpoints" / LAST, weights_only=True)["state_dict"] for path in (run, copy)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert torch.load(copy / "checkpoints" / PREVIOUS, weights_only=True)["global_step"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_yet_in_its_place_gets_there_before_the_next_save(
    kind: str, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run was killed between two renames, when only `last.ckpt.part` held the newest state."""
    run, checkpoints = tmp_path / "run", tmp_path / "run/checkpoints"
    command = [*small, "--output", run, "--checkpoint_every", 3]
    assert pretrain(*command) == 0
    newest = torch.load(checkpoints / PREVIOUS, weights_only=True)
    assert newest["global_step"] == 6
    for name in (LAST, PREVIOUS):
        remove(checkpoints / name)
    if kind == "folder":
        (checkpoints / PART).mkdir()
        save_flushed({"shards": {}, "checkpoint": newest}, checkpoints / PART / ABOUT)
    else:
        save_flushed(newest, checkpoints / PART)
    left: list[Path | None] = []

    def full(content: object, path: Path) -> int:
        path.write_bytes(b"half")
        left.append(find_checkpoint(checkpoints)[0])  # what a kill at this moment would leave
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_flushed", full)
        assert pretrain(*command) == 1
    assert "the checkpoint of step 6 is whole" in capsys.readouterr().err
    assert left and set(left) == {checkpoints / LAST} and not (checkpoints / PART).exists()
    assert pretrain(*command) == 0
    assert "at step 6 of 8" in capsys.readouterr().out
    assert torch.load(checkpoints / LAST, weights_only=True)["global_step"] == 8


@pytest.mark.parametrize("failures", [1, 2])
def test_what_could_not_be_put_in_its_place_is_not_removed_for_another_try(
    failures: int, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk cannot rename at step 6, and then has no room for what an end tries to save."""
    written, failed = list[int](), list[int]()

    def save(content: dict[str, Any], path: Path) -> int:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(content["global_step"])
        return save_flushed(content, path)

    def place(part: Path, keep: bool) -> None:
        if len(written) == 2 and len(failed) < failures:
            failed.append(1)
            raise OSError(errno.EIO, "Input/output error")
        put_in_place(part, keep)

    monkeypatch.setattr(checkpoint_files, "save_flushed", save)
    monkeypatch.setattr(checkpoints, "put_in_place", place)
    assert pretrain(*small, "--output", tmp_path / "run", "--checkpoint_every", 3) == 1
    assert written == [3, 6]
    newest = torch.load(tmp_path / "run/checkpoints" / (LAST if failures == 1 else PART), weights_only=True)
    assert newest["global_step"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_one_that_is_not_in_its_place_is_taken_before_the_one_before(kind: str, tmp_path: Path) -> None:
    for step, name in enumerate((PREVIOUS, LAST, PART), start=1):
        write(tmp_path / name, step, kind)
    cut(spoilt_files(tmp_path / LAST)[-1], 0.5)
    path, (finding,) = find_checkpoint(tmp_path)
    assert path == tmp_path / PART and finding.startswith(f"{tmp_path / LAST} is damaged (")
    cut(spoilt_files(tmp_path / PART)[-1], 0.5)
    assert find_checkpoint(tmp_path) == (tmp_path / PREVIOUS, [finding])


def test_a_failed_save_names_the_checkpoint_that_is_left_whatever_it_is_called(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoints = tmp_path / "run", tmp_path / "run/checkpoints"
    command = [*small, "--output", run, "--checkpoint_every", 3]

    def full(content: object, path: Path) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_flushed", full)
        assert pretrain(*command) == 1
    assert "; there is no other. Make room" in capsys.readouterr().err
    assert pretrain(*command) == 0
    remove(checkpoints / LAST)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_flushed", full)
        assert pretrain(*command) == 1
    assert "; the checkpoint of step 6 is whole. Make room" in capsys.readouterr().err
    assert find_checkpoint(checkpoints) == (checkpoints / PREVIOUS, [])


def test_what_cannot_be_read_is_not_all_there_is(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with pytest.raises(TaskError, match=r"it has no checkpoints/last.ckpt$"):
        checkpoint_path(tmp_path / "run")
    write(checkpoints / PREVIOUS, 1, "file")
    with pytest.raises(TaskError, match=r"it has no checkpoints/last.ckpt; the one before is .*previous.ckpt$"):
        checkpoint_path(tmp_path / "run")
    for name in (LAST, PREVIOUS):
        save_flushed({"weights": 1}, tmp_path / name)
    with pytest.raises(RunError, match=r"last.ckpt cannot be read .KeyError.; remove it to go on from .*previous.ckpt"):
        read_run_checkpoint(tmp_path / LAST)
    with pytest.raises(RunError, match=r"previous.ckpt cannot be read .KeyError.; remove it to begin this run anew"):
        read_run_checkpoint(tmp_path / PREVIOUS)
