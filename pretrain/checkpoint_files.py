"""Checkpoints on disk, a file or the folder of a sharded model: reading, checking, and taking the last one's place.

checkpoints/last.ckpt       the newest
checkpoints/previous.ckpt   the one before, for the day on which the newest turns out to be damaged
checkpoints/last.ckpt.part  one that is being written
"""

import contextlib
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.errors import RunError
from tasks.sharded_files import ABOUT, read_about, read_shard, read_sharded, save_flushed, whole

LAST, PREVIOUS, PART = "last.ckpt", "previous.ckpt", "last.ckpt.part"
CHECKERS = 8


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's files, written straight to the disk, and read also where they are the folder of a sharded model."""

    def __init__(self, writer: CheckpointWriter | None = None) -> None:
        self.writer = writer or CheckpointWriter()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes and flushes, or has it done in the background; OSError when there is no room."""
        kept = self.writer.keep(checkpoint)
        self.writer.do(lambda: _write(kept, Path(path)))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """All of it, on the host; never more than tensors and plain values."""
        if Path(path).is_dir():
            return whole(read_sharded(Path(path)))  # type: ignore[no-any-return]
        return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(path)
    save_flushed(checkpoint, path)


def load_pieces(path: Path) -> dict[str, Any]:
    """What a checkpoint of either kind holds, large tensors mapped and not yet read."""
    if path.is_dir():
        return read_sharded(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]


def find_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole (None: there is none at all), and what is wrong with those that are not.

    Reads them in full, for their checksums. RunError when there are some and none is whole.
    """
    findings: list[str] = []
    # Between two renames of a folder nothing is called last.ckpt; what was about to be is whole then. It is newer than
    # the others, or was cut off when it was written, which is no damage.
    for path in (directory / name for name in (LAST, PART, PREVIOUS) if _exists(directory / name)):
        reason = damage(path)
        if reason is None:
            return path, findings
        if path.name != PART:
            findings.append(f"{path} is damaged ({reason})")
    if not findings:
        return None, []
    raise RunError(f"{'; '.join(findings)}: restore a copy, or remove it to begin this run anew")


def _exists(path: Path) -> bool:
    """Also where the disk does not let us see it: that is not the same as nothing."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: every byte that matters is as it was written."""
    try:
        if not path.is_dir():
            if reason := _damage_of_file(path):
                return reason
            load_pieces(path)
            return None
        if not (path / ABOUT).is_file():
            return f"{ABOUT} is missing: it was not written to its end"
        if reason := _damage_of_file(path / ABOUT):
            return reason
        about = read_about(path)
        sizes: dict[str, int] = about["shards"]
        for name, size in sizes.items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                return f"{name} is missing or has lost bytes"
        with ThreadPoolExecutor(CHECKERS) as pool:  # zlib's checksum lets other threads run
            if reason := next(filter(None, pool.map(_damage_of_file, [path / name for name in sizes])), None):
                return reason
        for name in sizes:
            read_shard(path / name, about)
        return None
    except (OSError, ValueError) as error:
        return str(error)
    except Exception as error:  # in what no checksum covers
        return f"{path.name}: damaged ({type(error).__name__})"


def _damage_of_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        return None if bad is None else f"{path.name}: wrong checksum of {bad}"
    except OSError as error:
        return f"{path.name}: {error.strerror or error}"
    except Exception as error:  # damage has as many faces as there are fields in the format
        return f"{path.name}: cut or damaged ({type(error).__name__})"


def put_in_place(part: Path, keep: bool = True) -> None:
    """The whole `last.ckpt.part` becomes `last.ckpt`, and that `previous.ckpt` (`keep`) or nothing.

    At every moment a whole checkpoint has one of the three names.
    """
    last, previous = part.with_name(LAST), part.with_name(PREVIOUS)
    if last.exists() and keep:
        remove(previous)
        if last.is_file() and part.is_file():
            with contextlib.suppress(OSError):  # not every file system has hard links
                os.link(last, previous)
        if not previous.exists():
            last.rename(previous)
    take_place(part, last)


def take_place(part: Path, path: Path) -> None:
    """The whole file or folder gets that name, instead of what had it."""
    if path.is_dir() or part.is_dir():
        remove(path)
    part.replace(path)
    flush_folder(part.parent)


def flush_folder(folder: Path) -> None:
    """What names a folder has, down to the disk."""
    with contextlib.suppress(OSError):  # not every file system can
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
