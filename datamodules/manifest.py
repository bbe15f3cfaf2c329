"""The manifest of a data set: its shards, counts and class names in one small file, so that starting reads no tar.

`manifest.json` lies beside the tars (or in the cache when they are read-only). It is the truth about the set: a shard
that is cut, damaged or gone keeps its place in it, so that the loader misses the lost samples and counts them.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.class_labels import CLASSES, LabelKinds, labels_of, named_by_labels
from datamodules.errors import DataError, DataFailure
from datamodules.shard_entry import MISSING, Shard, describe_shard, entry_now, what_changed
from datamodules.sidecars import locked, read_sidecar, sidecar_places, still_good, write_sidecar
from datamodules.tar_index import cannot_read, read_index
from datamodules.workers import Tick, spread

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.jsonl"
REMOTE = "trivit_remote.json"
"""In a folder of the cache that stands for a remote set: see `remote_set`."""
SKIPPED = "skipped.tsv"
_SHARDS_FOR_PROCESSES = 64
log = logging.getLogger("trivit")


@dataclass(frozen=True)
class Manifest:
    """A set of shards in the order of their names.

    `classes`: the name of each label, empty when unknown (a label is then called by its number); `members`: extension
    -> how many samples have it; `made_by`: what wrote the set; `hash`: over names, sizes, offsets and classes; `url`:
    of a remote set, of which `root` is only the place in the cache.
    """

    root: Path
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()
    members: dict[str, int] = field(default_factory=dict)
    made_by: str = ""
    url: str = ""

    @property
    def name(self) -> str:
        """What a user calls the set: its URL or folder."""
        return self.url or str(self.root)

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Samples of each shard."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @property
    def hash(self) -> str:
        """The same for two copies of one set wherever they lie, another one after any change that matters."""
        rows = [(shard.name, shard.samples, shard.bytes, shard.digest) for shard in self.shards]
        return hashlib.sha256(json.dumps([rows, self.classes]).encode()).hexdigest()[:32]

    @property
    def unnamed_hash(self) -> str:
        """`hash` of the same samples where no class has a name: what is trained on where nothing is said of classes."""
        return replace(self, classes=()).hash

    @cached_property
    def fingerprint(self) -> str:
        """`hash`, and another one whenever a tar here was written anew: for what is kept of the bytes themselves.

        As the tars were when it was first asked for: what is read afterwards is never taken for newer than it is. One
        that is not to be had is without a time; who reads the set counts what it misses.
        """
        written = [] if self.url else [_written_ns(self.path(i)) for i in range(len(self.shards))]
        return hashlib.sha256(json.dumps([self.hash, written]).encode()).hexdigest()[:32]

    def path(self, shard: int) -> Path:
        """Where the tar of shard number `shard` lies."""
        return self.root / self.shards[shard].name

    def to_bytes(self) -> bytes:
        """The content of manifest.json."""
        about = {
            "format": FORMAT, "hash": self.hash, "samples": self.num_samples, "made_by": self.made_by,
            "members": self.members, "classes": self.classes, "shards": [vars(shard) for shard in self.shards],
        }  # fmt: skip
        return (json.dumps(about, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, root: Path, data: bytes) -> "Manifest":
        """Read manifest.json; ValueError when it is damaged, of another format, or was edited."""
        try:
            about: dict[str, Any] = json.loads(data)
            shards = tuple(Shard(**shard) for shard in about["shards"])
            manifest = cls(root, shards, tuple(about["classes"]), about["members"], about["made_by"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error}") from error
        if about["format"] != FORMAT or about["hash"] != manifest.hash:
            raise ValueError("a manifest of another format, or edited")
        return manifest


def skipped_images(root: Path) -> list[tuple[str, str]]:
    """Name and reason of each image that could not be read when the set in this folder was packed."""
    try:
        lines = (root / SKIPPED).read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [(name, reason) for name, _, reason in (line.partition("\t") for line in lines)]


def load_manifest(root: str | os.PathLike[str]) -> Manifest:
    """The manifest of the tars in the folder `root`; made (with a progress bar) when it is missing or out of date.

    Shards that were cut, damaged or removed stay in it, with a warning; for new or replaced ones it is made anew.

    Raises:
        DataError: when there is no such folder, no tar in it, no sample in the tars, or the set is unfinished.
    """
    root = Path(root)
    if (root / REMOTE).is_file():
        return _remote_manifest(root)
    former = _stored_manifest(root, list_tars(root))
    if former is not None and former.holds and not _named_since(former.manifest):
        return former.manifest
    with _alone(root):  # the other ranks of a run wait here, and find it made
        tars = list_tars(root)
        former = _stored_manifest(root, tars)
        if former is None:
            return build_manifest(root, sorted(tars))
        if former.holds:
            named = _named_since(former.manifest)
            return build_manifest(root, sorted(former.kept), (), former.kept) if named else former.manifest
        kept, before = former.kept, former.manifest
        manifest = build_manifest(root, sorted({*tars, *kept}), before.classes, kept)
        log.warning(
            "%s: the tars have changed: %d samples, before %d (%s)",
            root, manifest.num_samples, before.num_samples, what_changed(before.shards, kept, set(tars)),
        )  # fmt: skip
        return manifest


def _remote_manifest(root: Path) -> Manifest:
    try:
        manifest = Manifest.from_bytes(root, (root / MANIFEST).read_bytes())
        return replace(manifest, url=json.loads((root / REMOTE).read_bytes())["url"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{root} in the cache is damaged ({error}): delete it, it will be fetched anew") from error


class _Former(NamedTuple):
    """A manifest as it is stored, and the entries of those of its shards that keep their place."""

    manifest: Manifest
    kept: dict[str, Shard]
    holds: bool


def _stored_manifest(root: Path, tars: dict[str, os.stat_result]) -> _Former | None:
    """The manifest that describes the folder as it is, else the one of before."""
    former = None
    for place, data in sorted(read_sidecar(root / MANIFEST), key=lambda found: _written_ns(found[0]), reverse=True):
        with contextlib.suppress(ValueError, OSError):
            found = _compare(Manifest.from_bytes(root, data), place, tars)
            if found.holds:
                return found
            former = former or found
    return former


def _named_since(manifest: Manifest) -> bool:
    """Whether classes that had numbers only have been given names."""
    return not manifest.classes and (manifest.root / CLASSES).is_file()


def _written_ns(place: Path) -> int:
    """When a file was written, in ns; 0 where it cannot be looked at."""
    with contextlib.suppress(OSError):
        return place.stat().st_mtime_ns
    return 0


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold a lock in the cache, so that of several processes that find no manifest one makes it; best effort."""
    lock = sidecar_places(root / MANIFEST)[1].with_suffix(".lock")
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(lock, wait=True))
        yield


def build_manifest(
    root: Path, names: Sequence[str], classes: tuple[str, ...] = (), kept: Mapping[str, Shard] | None = None
) -> Manifest:  # fmt: skip
    """Index the tars `names` in `root` as far as necessary and write the manifest.

    Names of classes are in `classes.txt` beside the tars, one on each line; else they are what labels say that are
    texts, in alphabetical order; else given. Entries that are `kept` stay as they are, whether their tars can be read
    or not.
    """
    tasks = [(root / name, (kept or {}).get(name)) for name in names]
    described: dict[str, Shard] = {}
    members = Counter[str]()
    labels: list[LabelKinds] = []
    with tqdm(total=len(tasks), desc="indexing", unit="shard", disable=None, leave=False, delay=0.5) as bar:
        workers = None if len(tasks) >= _SHARDS_FOR_PROCESSES else 1
        for (path, _), (shard, counts, kinds) in spread(_index_shard, tasks, workers=workers, tick=bar.update):
            described[path.name] = shard
            members += counts
            labels.append(kinds)
    shards = tuple(described[name] for name in names)
    if not sum(shard.samples for shard in shards):
        raise DataError(f"{root}: its {len(names)} tars hold no samples (files called KEY.EXTENSION)")
    if (root / CLASSES).is_file():
        try:
            classes = tuple((root / CLASSES).read_text("utf-8").splitlines())
        except OSError as error:
            raise DataError(cannot_read(root / CLASSES, error)) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{root / CLASSES} is not UTF-8 text: one class name on each line is needed") from error
    else:
        classes = named_by_labels(root, labels, classes)
    manifest = Manifest(root, shards, classes, dict(sorted(members.items())))
    write_sidecar(root / MANIFEST, manifest.to_bytes())
    return manifest


def _index_shard(task: tuple[Path, Shard | None], tick: Tick) -> tuple[Shard, Counter[str], LabelKinds]:
    """Index one tar and describe it, unless its entry is given; returns members of each extension and labels, too."""
    path, kept = task
    try:
        index = read_index(path)
        labels = labels_of(index)
    except (DataError, OSError) as error:
        if kept is None or isinstance(error, DataFailure):
            raise
        return kept, Counter(), LabelKinds("", frozenset())
    finally:
        tick(1)
    return kept or describe_shard(index), index.extension_counts(), labels


def list_tars(root: Path) -> dict[str, os.stat_result]:
    """File name -> size and times of every tar in a folder; DataError as in `load_manifest`.

    The tars of a remote set need not be in its folder.
    """
    try:
        if (root / REMOTE).is_file():
            shards = _remote_manifest(root).shards
            return {shard.name: os.stat_result((0o100444, 0, 0, 1, 0, 0, shard.bytes, 0, 0, 0)) for shard in shards}
        with os.scandir(root) as entries:
            files = {entry.name: entry for entry in entries}
        if UNFINISHED in files:
            raise DataError(f"{root} is unfinished: run the command that began it again ({_begun_by(root)})")
        tars = {
            name: entry.stat()
            for name, entry in files.items()
            if name.endswith(".tar") and not name.startswith(".") and entry.is_file()
        }
        if tars:
            return tars
        below = sorted(name for name, entry in files.items() if entry.is_dir() and any(Path(entry.path).glob("*.tar")))
    except NotADirectoryError as error:
        raise DataError(f"{root} is not a folder: give the folder that holds the tars") from error
    except OSError as error:
        raise DataError(cannot_read(root, error)) from error
    hint = f"; did you mean {root / below[0]}?" if below else ""
    raise DataError(f"{root} holds no .tar files{hint}")


def _begun_by(root: Path) -> str:
    """What the first line of `unfinished.jsonl` says."""
    try:
        return str(json.loads((root / UNFINISHED).read_text("utf-8").partition("\n")[0])["made_by"])
    except (OSError, ValueError, KeyError, TypeError):
        return "which one is not known: delete the folder"


def _compare(manifest: Manifest, place: Path, tars: dict[str, os.stat_result]) -> _Former:
    """Which shards of a manifest are still those it lists; what is damaged or gone is told, but keeps its place.

    Unless none of them is there any more, but other tars are: then this is another set.
    """
    made = place.stat().st_mtime_ns
    kept: dict[str, Shard] = {}
    ill: dict[str, list[str]] = {}
    newer = False
    for shard in manifest.shards:
        tar = tars.get(shard.name)
        entry: Shard | None = shard
        what = ""
        if tar is None:
            what = MISSING
        elif tar.st_size != shard.bytes or tar.st_mtime_ns > made:
            newer = True
            entry, what = entry_now(manifest.root / shard.name, shard)
        if entry is not None:
            kept[shard.name] = entry
        if what:
            ill.setdefault(what, []).append(shard.name)
    holds = tuple(kept.values()) == manifest.shards and not set(tars) - set(kept)
    if not holds and list(kept) == ill.get(MISSING, []):
        return _Former(manifest, {}, False)
    if ill:
        about = " and ".join(
            f"{len(names)} of {len(manifest.shards)} shards {what} (first: {names[0]})" for what, names in ill.items()
        )
        _warn_once(
            f"{manifest.root}: {about} since {MANIFEST} was written. What they have lost counts as bad samples; if "
            f"this is meant, delete {MANIFEST} and the .idx files of these shards"
        )
    elif holds and newer:
        still_good(manifest.root / MANIFEST, place, manifest.to_bytes())  # the tars were only copied or touched
    return _Former(manifest, kept, holds)


@cache
def _warn_once(message: str) -> None:
    """Evaluation reads the same set for the encoder and for each floor."""
    log.warning("%s", message)
