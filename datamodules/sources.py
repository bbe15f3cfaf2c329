"""Where images to be packed come from: class folders, a flat folder, a tar of either, or a table of paths."""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datamodules.errors import DataError
from datamodules.remote import check_url, is_remote
from datamodules.tables import TABLES
from datamodules.tar_index import PLAIN_IMAGES, cannot_read, open_tar
from datamodules.tar_samples import ARRAY
from datamodules.tar_walk import walk_tar
from datamodules.text_files import find_texts, kind_of

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class Image:
    """One image to be packed: its name inside of the source, where its bytes lie (offset in a tar), and how many."""

    name: str
    size: int
    offset: int = -1


@dataclass(frozen=True)
class Source:
    """The images of a folder, tar or table, sorted by name.

    `root`: the folder or tar that their names begin in; `classes`: names of the class folders or labels, empty for
    unlabelled images and for labels that are numbers; `prefix`: folders above all images, which mean nothing;
    `ignored`: how many other files there are by suffix; `notes`: what the user should know.
    `skipped`: name and reason of links that lead nowhere, of FIFOs and the like, and of what a table names in vain. Of
    a table: `numbers`: label of each image, -1 for none; `captions` of each. Of folders and tars: `texts` that lie
    beside each image; `lone_texts`: name and reason of those that belong to none.
    """

    path: Path
    root: Path
    images: tuple[Image, ...]
    classes: tuple[str, ...]
    prefix: str
    ignored: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    captions: tuple[tuple[str, ...], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    texts: tuple[tuple[Image, ...], ...] = ()
    lone_texts: tuple[tuple[str, str], ...] = ()

    def labels(self) -> list[int]:
        """Number of each image's class, -1 when unlabelled."""
        if self.numbers:
            return list(self.numbers)
        numbers = {name: number for number, name in enumerate(self.classes)}
        return [numbers.get(self.inner_name(image).partition("/")[0], -1) for image in self.images]

    def inner_name(self, image: Image) -> str:
        """The image's name without the folders that are above all images."""
        return image.name[len(self.prefix) :]

    def digest(self) -> str:
        """Changes when an image or a text is added, removed, renamed, resized, or labelled anew by a table."""
        digest = hashlib.sha256()
        for image in (*self.images, *(text for texts in self.texts for text in texts)):
            digest.update(f"{image.name}\0{image.size}\0".encode(errors="surrogateescape"))  # a name need not be UTF-8
        if self.numbers:
            digest.update(json.dumps([self.classes, self.numbers]).encode())
        return digest.hexdigest()[:12]


class SourceReader:
    """Reads images of a source; each process makes its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tar = open_tar(str(path)) if path.is_file() else -1

    def read(self, image: Image) -> bytes:
        """The file's bytes. OSError when they cannot be had."""
        if self._tar < 0:
            return (self.path / image.name).read_bytes()
        data = os.pread(self._tar, image.size, image.offset)
        if len(data) < image.size:
            raise OSError(f"only {len(data)} of {image.size} bytes are there")
        return data

    def close(self) -> None:
        """Close the tar."""
        if self._tar >= 0:
            os.close(self._tar)
            self._tar = -1


def list_source(path: str | os.PathLike[str], columns: Mapping[str, str | None] | None = None) -> Source:
    """Find the images below a folder, in a tar, or in a table, and what their folders or labels mean.

    Args:
        path: of the folder, tar or table.
        columns: of a table, as `list_table` takes them.

    Raises:
        DataError: when the path does not exist or may not be read, holds no images, or holds several splits.
    """
    if is_remote(path):
        raise DataError(f"{check_url(os.fspath(path))} is a URL, and only files can be packed: download them first")
    path = Path(path)
    named = [f"--{kind}-column" for kind, name in (columns or {}).items() if name is not None]
    try:
        is_folder = path.is_dir()
        if not is_folder:
            path.stat()
    except OSError as error:
        raise DataError(cannot_read(path, error)) from error
    if kind := None if is_folder else kind_of_file(path.stat().st_mode):
        raise DataError(f"{path} is {kind}, not a file")
    if not is_folder and path.suffix.lower() in TABLES:
        from datamodules.table_source import list_table  # which stands on this file

        return list_table(path, columns or {})
    if named:
        raise DataError(f"{path} is no table ({', '.join(TABLES)}), so it has no {named[0]}")
    if not is_folder and path.suffix != ".tar":
        raise DataError(f"{path} is neither a folder nor a .tar nor a table ({', '.join(TABLES)})")
    files, skipped, notes = _in_folder(path) if is_folder else _in_tar(path)
    skipped = [(name, reason) for name, reason in skipped if is_image(name)]
    suffixes = Counter(PurePosixPath(file.name).suffix.lower() or "no suffix" for file in files)
    images = sorted((file for file in files if is_image(file.name)), key=lambda image: image.name)
    ignored = Counter({suffix: n for suffix, n in suffixes.items() if suffix[1:] not in PLAIN_IMAGES})
    if not images and f".{ARRAY}" in ignored:
        images = sorted((file for file in files if is_image(file.name, {ARRAY})), key=lambda image: image.name)
        del ignored[f".{ARRAY}"]
    if not images:
        other = ", ".join(f"{n} {suffix}" for suffix, n in ignored.most_common(3))
        if skipped:
            raise DataError(f"{path} holds no images that can be read (first: {': '.join(min(skipped))})")
        found = f"only other files ({other})" if other else "it is empty"
        raise DataError(f"{path} holds no images, {found}; names of images end in {', '.join(sorted(PLAIN_IMAGES))}")
    prefix = shared_prefix([image.name for image in images])
    inner = [image.name[len(prefix) :] for image in images]
    classes = sorted({name.partition("/")[0] for name in inner if "/" in name})
    loose = sum("/" not in name for name in inner)
    if classes and loose:
        notes.append(f"{loose} images lie beside the folders ({classes[0]}, ...): all are packed without labels")
        classes = []
    elif prefix and not classes:
        only = prefix.rstrip("/").rpartition("/")[2]
        notes.append(f"all images lie in one folder, {only}, which is taken for no class: they have no labels")
    if len(classes) > 1 and {name.lower() for name in classes} <= _SPLITS:
        raise DataError(f"{path} holds the splits {' and '.join(classes)}: pack each of them for itself")
    texts, lone = find_texts(images, files)
    ignored -= Counter(f".{kind_of(text)}" for text in {text for each in texts for text in each})
    return Source(
        path, path, tuple(images), tuple(classes), prefix, ignored, tuple(notes), skipped=tuple(sorted(skipped)),
        texts=tuple(texts), lone_texts=tuple(lone),
    )  # fmt: skip


def is_image(name: str, suffixes: Set[str] = PLAIN_IMAGES) -> bool:
    """Whether a file is an image by its suffix; hidden files (`._x.jpg` of a Mac) are not."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base.rpartition(".")[2].lower() in suffixes and "." in base


def shared_prefix(names: Sequence[str]) -> str:
    """The folders, with a slash behind them, that all files lie in."""
    folders = [name.rpartition("/")[0] for name in names]
    if not all(folders) or len({folder.startswith("/") for folder in folders}) > 1:
        return ""
    shared = os.path.commonpath(folders)
    return f"{shared.rstrip('/')}/" if shared else ""


def kind_of_file(mode: int) -> str | None:
    """What something with this `st_mode` is if it can be opened but is no regular file, whose bytes end."""
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
             stat.S_IFDIR: "a folder"}  # fmt: skip
    return kinds.get(stat.S_IFMT(mode))


def _in_folder(root: Path) -> tuple[list[Image], list[tuple[str, str]], list[str]]:
    """All files below a folder, through links as well, but through none twice; names of what is no file, and why."""
    files: list[Image] = []
    skipped: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    stack = [""]
    while stack:
        below = stack.pop()
        folder = root / below
        try:
            about = folder.stat()
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = f"{below}{entry.name}"
                    if entry.is_dir() and not entry.name.startswith("."):
                        stack.append(f"{name}/")
                    elif entry.is_file():
                        files.append(Image(name, entry.stat().st_size))
                    elif not Path(entry).exists():
                        skipped.append((name, "the link leads nowhere"))
                    elif not entry.is_dir():
                        skipped.append((name, f"{kind_of_file(entry.stat().st_mode)}, not a file"))
        except OSError as error:
            raise DataError(cannot_read(folder, error)) from error
    return files, skipped, []


def _in_tar(path: Path) -> tuple[list[Image], list[tuple[str, str]], list[str]]:
    """All regular files in a tar; what is wrong with it becomes notes."""
    fd = open_tar(str(path))
    found: dict[str, list[str]] = {}
    try:
        walk = walk_tar(
            fd,
            os.fstat(fd).st_size,
            lambda kind, name, detail: found.setdefault(kind, []).append(f"{name} {detail}".strip()),
        )
    finally:
        os.close(fd)
    files: dict[str, Image] = {}
    for raw, size, offset in zip(walk.names, walk.sizes, walk.offsets, strict=True):
        parts = raw.decode("utf-8", "backslashreplace").split("/")
        name = "/".join(part for part in parts if part not in ("", ".", ".."))
        files[name] = Image(name, size, offset)
    notes = [f"{path.name}: {len(where)} x {kind}, first: {where[0]}" for kind, where in found.items()]
    if len(files) < len(walk.names):
        notes.append(f"{path.name}: {len(walk.names) - len(files)} files have the name of another; the last is taken")
    return list(files.values()), [], notes
