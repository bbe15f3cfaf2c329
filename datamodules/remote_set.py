"""A set of shards behind a URL, as a folder in the cache whose tars come when they are opened.

The folder has the manifest and `trivit_remote.json`, which says where each tar comes from and what it must be: so many
bytes, and the members that the manifest counted or, in a set without one, the version that the server showed at the
start. Its name holds a hash of the URL and of all that, hence a set that was replaced is another folder.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from tqdm import tqdm

from datamodules import remote, shard_cache
from datamodules.class_labels import CLASSES, LABEL, LabelKinds, labels_of, named_by_labels
from datamodules.console import tell
from datamodules.errors import DataError, DataFailure
from datamodules.manifest import MANIFEST, REMOTE, Manifest
from datamodules.shard_entry import Shard, describe_shard
from datamodules.sidecars import cannot_write, locked, write_aside
from datamodules.tar_index import INDEX_SUFFIX, ShardIndex, read_index, scan_tar

_REQUESTS_AT_ONCE = 16
_TRY_A_LOST_SHARD_AGAIN_AFTER = (10.0, 300.0)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Origin:
    """Where a tar of a remote set comes from: URL, bytes, and either the digest of its index or its version."""

    url: str
    bytes: int | None = None
    digest: str = ""
    version: str = ""


def open_remote(url: str) -> Path:
    """The folder that stands for the set behind `url` (a folder, a tar, or tars in brace notation).

    Raises:
        DataError: the URL is none of ours or holds a secret, nothing or no set is there, or it cannot be read.
    """
    url = remote.check_url(url)
    if "{" in url or url.endswith(".tar"):
        tars = expand(url)
        origins = dict(zip(short_names(tars), _in_parallel(_origin, tars, "looking"), strict=True))
        return _open_without_manifest(url, _common_folder(tars), origins)
    try:
        manifest, content = _manifest_of(url)
    except remote.NotThereError:
        return _open_without_manifest(url, url, _listed(url))
    origins = {
        shard.name: Origin(f"{url}/{_quoted(url, shard.name)}", shard.bytes, shard.digest) for shard in manifest.shards
    }
    root = _folder(url, manifest.hash)
    _check_names(url, origins)
    _write(root, url, origins, content)
    return root


def fetch(path: Path, *, wait: bool = True) -> bool:
    """Have a tar of a remote set in the cache; False for a tar of no remote set.

    Args:
        path: of the tar in its set's folder.
        wait: for another process that fetches it already, and fetch it even if the space is taken by others on their
            way; otherwise both are answered with False.

    Raises:
        DataFailure: the disk is full, or the cache cannot be written.
        DataError: the shard is lost: not there, not what it was, or the network fails again and again.
    """
    origin = origins_in(path.parent).get(path.name)
    if origin is None:
        return False
    return shard_cache.cached(path, origin.bytes or 0, functools.partial(_fill, path, origin), wait=wait)


def origins_in(root: Path) -> dict[str, Origin]:
    """File name -> origin of the tars of a remote set; empty for any other folder."""
    return _origins(root / REMOTE) if (root / REMOTE).is_file() else {}


def expand(pattern: str) -> list[str]:
    """Brace notation as WebDataset has it: `train-{000000..000015}.tar`, `{a,b}/x.tar`. DataError for broken braces."""
    from braceexpand import braceexpand

    try:
        found = list(dict.fromkeys(braceexpand(pattern)))
    except ValueError:
        raise DataError(f"{pattern}: a brace is not closed; write for example train-{{000000..000015}}.tar") from None
    if odd := [name for name in found if not name.endswith(".tar")]:
        raise DataError(f"{odd[0]} is no .tar: in braces, name the tars themselves; or give the folder alone")
    return found


def short_names(tars: Sequence[str]) -> list[str]:
    """A file name for each path or URL: its own, or with the folders before it where those differ."""
    names = [unquote(tar.rpartition("/")[2]) if remote.is_remote(tar) else tar.rpartition("/")[2] for tar in tars]
    if len(set(names)) < len(names):
        above = len(_common_folder(tars)) + 1
        names = [tar[above:].replace("/", "__") for tar in tars]
    if len(set(names)) < len(set(tars)):  # `a__b/c.tar` and `a/b__c.tar`
        digests = [hashlib.sha256(os.fsencode(tar)).hexdigest()[:12] for tar in tars]
        names = [f"{name.removesuffix('.tar')}-{digest}.tar" for name, digest in zip(names, digests, strict=True)]
    return names


def _common_folder(tars: Sequence[str]) -> str:
    first, last = min(tars), max(tars)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same].rpartition("/")[0]


def _quoted(url: str, name: str) -> str:
    return quote(name) if url.startswith("http") else name


def _origin(url: str) -> Origin:
    about = remote.about(url, remote.IMPATIENT)
    return Origin(url, about.bytes, version=about.version or str(about.bytes))


def _listed(url: str) -> dict[str, Origin]:
    """The tars in a folder without a manifest."""
    if url.startswith("http"):
        raise DataError(
            f"{url} has no {MANIFEST}, and http cannot list files: upload the one that `trivit shards inspect DIR` "
            f"writes beside the tars, or name the tars: {url}/NAME-{{000000..000015}}.tar"
        )
    tars = remote.list_tars(url, remote.IMPATIENT)
    if not tars:
        raise DataError(f"{url} holds no .tar files")
    return {name: Origin(f"{url}/{name}", about.bytes, version=about.version) for name, about in tars.items()}


def _open_without_manifest(url: str, folder: str, origins: dict[str, Origin]) -> Path:
    """Make a manifest: from the indexes where they lie beside the tars, else every tar is fetched once."""
    root = _folder(url, json.dumps([asdict(origin) for origin in origins.values()]))
    _check_names(url, origins)
    _write(root, url, origins, None)
    with _written(root), locked(root / ".manifest.lock", wait=True):
        if not (root / MANIFEST).is_file():
            tell(f"{url}: no {MANIFEST}; indexing {len(origins)} tars, once")
            indexed = _in_parallel(lambda item: _indexed(root / item[0], item[1]), origins.items(), "indexing")
            members = sum((counts for _, counts, _ in indexed), Counter[str]())
            shards = tuple(shard for shard, _, _ in indexed)
            if not sum(shard.samples for shard in shards):
                raise DataError(f"{url}: its {len(origins)} tars hold no samples (files called KEY.EXTENSION)")
            classes = _classes(folder)
            labels = [kinds for _, _, kinds in indexed if kinds is not None]
            if not classes and len(labels) == len(indexed):
                classes = named_by_labels(url, labels, ())
            manifest = Manifest(root, shards, classes, dict(sorted(members.items())))
            write_aside(root / MANIFEST, manifest.to_bytes())
    return root


def _indexed(path: Path, origin: Origin) -> tuple[Shard, Counter[str], LabelKinds | None]:
    """The entry of a tar, members of each extension, and its labels; None where that would need a fetch of the tar."""
    index = _index_beside(origin, path)
    labels = None if index is not None and LABEL in index.extensions else LabelKinds("", frozenset())
    if index is None:
        index, labels = _fetched_index(path, origin)
    return describe_shard(index), index.extension_counts(), labels


def _fetched_index(path: Path, origin: Origin) -> tuple[ShardIndex, LabelKinds]:
    """Index and labels of a tar that is fetched if need be; other threads may evict both at any time."""
    while True:
        filled: list[tuple[ShardIndex, LabelKinds]] = []

        def fill(aside: Path, filled: list[tuple[ShardIndex, LabelKinds]] = filled) -> None:
            data = _fill(path, origin, aside)
            labels = labels_of(ShardIndex.from_bytes(str(aside), data))
            filled.append((ShardIndex.from_bytes(str(path), data), labels))

        shard_cache.cached(path, origin.bytes or 0, fill)
        if filled:
            return filled[-1]
        try:
            index = read_index(path)
            return index, labels_of(index)
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise


def _classes(folder: str) -> tuple[str, ...]:
    """Names of the classes, from `classes.txt` or the manifest of the whole folder.

    S3 answers 403 for a file that is not there, unless the folder may be listed.
    """
    with contextlib.suppress(remote.NotThereError, remote.ForbiddenError):
        return tuple(remote.read(f"{folder}/{CLASSES}", remote.IMPATIENT).decode("utf-8", "replace").splitlines())
    with contextlib.suppress(remote.NotThereError, remote.ForbiddenError):
        return _manifest_of(folder)[0].classes
    return ()


def _manifest_of(folder: str) -> tuple[Manifest, bytes]:
    """The manifest beside the tars, and the file as it is; DataError when it is damaged or cannot be had."""
    content = remote.read(f"{folder}/{MANIFEST}", remote.IMPATIENT)
    try:
        return Manifest.from_bytes(Path(), content), content
    except ValueError as error:
        raise DataError(f"{folder}/{MANIFEST} is damaged ({error}): upload it again") from None


def _check_names(url: str, names: Iterable[str]) -> None:
    """Names from elsewhere become files here: plain ones only."""
    for name in names:
        if "/" in name or "\0" in name or name.startswith(".") or not name.endswith(".tar") or len(name) > 200:
            raise DataError(f"{url}: {name[:80]!r} is no plain name of a .tar")


def _folder(url: str, version: str) -> Path:
    digest = hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:24]
    return shard_cache.remote_cache() / f"{re.sub(r'[^0-9A-Za-z]+', '_', url.partition('://')[2])[-60:]}-{digest}"


def _write(root: Path, url: str, origins: dict[str, Origin], manifest: bytes | None) -> None:
    """Write what makes the folder, unless another process did; forget which shards were lost in earlier runs."""
    with _written(root):
        shard_cache.shrink()  # where a wrong size is told now and not by a worker
        for note in root.glob(".*.lost"):
            note.unlink(missing_ok=True)
        if not (root / REMOTE).is_file():
            about = {"url": url, "shards": {name: asdict(origin) for name, origin in origins.items()}}
            write_aside(root / REMOTE, json.dumps(about).encode())
        if manifest is not None and not (root / MANIFEST).is_file():
            write_aside(root / MANIFEST, manifest)


@contextlib.contextmanager
def _written(root: Path) -> Any:
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataFailure(cannot_write(root / REMOTE, error)) from error


@functools.lru_cache(maxsize=16)
def _origins(path: Path) -> dict[str, Origin]:
    return {name: Origin(**origin) for name, origin in json.loads(path.read_bytes())["shards"].items()}


def _fill(path: Path, origin: Origin, aside: Path) -> bytes:
    """Fetch a tar to `aside` and its index to its place; what fails is noted for those who wait for the same shard.

    Returns the index.
    """
    note = path.with_name(f".{path.name}.lost")
    if lost := _read_note(note):
        raise DataError(lost)
    began = time.monotonic()
    try:
        index = _download(path, origin, aside)
    except DataError as error:
        shortest, longest = _TRY_A_LOST_SHARD_AGAIN_AFTER
        pause = min(max(10 * (time.monotonic() - began), shortest), longest)
        write_aside(note, json.dumps({"until": time.time() + pause, "why": str(error)}).encode())
        raise
    note.unlink(missing_ok=True)
    return index


def _read_note(note: Path) -> str:
    """Why a shard is lost, as long as trying again would be in vain."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        lost = json.loads(note.read_bytes())
        if time.time() < lost["until"]:
            return str(lost["why"])
    return ""


def _download(path: Path, origin: Origin, aside: Path) -> bytes:
    if origin.version and (now := _origin(origin.url)) != origin:
        raise DataError(f"{origin.url} was replaced on the server ({now.bytes} bytes): start again to take the new set")
    remote.download(origin.url, aside, origin.bytes, remote.PATIENT)
    try:
        index = scan_tar(aside)
    except DataError as error:
        raise DataError(str(error).replace(str(aside), origin.url)) from None
    if origin.digest and describe_shard(index).digest != origin.digest:
        raise DataError(f"{origin.url} is not the shard that {MANIFEST} lists: one of the two was replaced")
    beside = _index_beside(origin, path)  # it has checksums
    if beside is not None and beside.same_members(index):
        index = beside
    data = index.to_bytes()
    write_aside(_index_path(path), data)
    return data


def _index_beside(origin: Origin, path: Path) -> ShardIndex | None:
    """The index that lies beside the tar on the server, if it fits what is known of the tar."""
    with contextlib.suppress(ValueError):  # DataErrors, too: without it, or with a wrong one, the tar itself tells
        index = ShardIndex.from_bytes(str(path), remote.read(origin.url + INDEX_SUFFIX, ()))
        return index if origin.bytes in (None, index.tar_bytes) else None
    return None


def _index_path(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


def _in_parallel(work: Callable[[Item], Result], items: Iterable[Item], what: str) -> list[Result]:
    """`work` for every item, in order, with many requests under way; the first exception ends it."""
    everything = list(items)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        try:
            results = pool.map(work, everything)
            return list(tqdm(results, desc=what, unit="shard", total=len(everything), disable=None, leave=False))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
