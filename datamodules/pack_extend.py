"""Adding images to a finished set: new shards beside the old ones, which stay as they are, and a new manifest.

The new shards are written in a folder of their own within the set, `.extend`, so that the set can be read all the
while. When all are done, a manifest there says so; then, in an instant, they are moved. Whatever interrupts this, the
old shards, labels and keys are untouched, and the same command goes on.
"""

import json
import re
from pathlib import Path

from tqdm import tqdm

from datamodules.class_labels import CLASSES
from datamodules.console import tell
from datamodules.errors import DataError
from datamodules.manifest import MANIFEST, SKIPPED, UNFINISHED, Manifest, load_manifest
from datamodules.pack import left_texts, pack_jobs, report, sum_up
from datamodules.pack_plan import Entry, Settings, make_entries, plan, with_hash
from datamodules.shard_writer import LOCK, begin_set, remove_leftovers
from datamodules.sidecars import locked, write_aside
from datamodules.sources import Source
from datamodules.tar_index import read_index
from datamodules.text_files import SKIPPED_TEXTS

_NUMBER = re.compile(r"shard-(\d+)\.tar")
_PACKED = re.compile(r"resize=(\S+) quality=(\S+) samples_per_shard=\d+ images=\d+ content=(\w+)")  # as in `pack`


def extend_set(
    dst: Path, source: Source, captions: list[list[str]], settings: Settings, made_by: str, workers: int | None
) -> Manifest:
    """Add the images of a source to the set in `dst`; does nothing when this was done before.

    Classes are matched by name and new ones added at the end, so labels stay what they are. A key that the set has
    already gets a suffix: another image under the same name is no mistake, but it is counted and told.

    Raises:
        DataError: when `dst` holds no finished set, holds the same images packed otherwise, labels that cannot be
            matched, another command is at work there, or no new image can be read.
    """
    if not dst.is_dir():
        raise DataError(f"{dst} holds no set that could be extended: leave --extend out")
    with locked(dst / LOCK, wait=False):
        try:
            _finish_interrupted(dst)
            before = load_manifest(dst)
            if _holds(before, made_by):
                tell(f"{dst}: holds these {len(source.images)} samples already, nothing to do")
                return before
            return _add(dst, before, source, captions, settings, made_by, workers)
        finally:
            (dst / LOCK).unlink(missing_ok=True)


def _holds(before: Manifest, made_by: str) -> bool:
    """Whether the set has these images as they would be packed now, however many to a shard; DataError: otherwise."""
    *wanted, content = _PACKED.findall(made_by)[-1]
    found = [settings for *settings, theirs in _PACKED.findall(before.made_by) if theirs == content]
    if not found or wanted in found:
        return bool(found)
    pairs = zip(("--resize", "--quality"), found[-1], wanted, strict=True)
    differing = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
    raise DataError(
        f"{before.root} holds these images already, packed with other settings ({differing[0]}): choose the same ones, "
        "or another folder"
    )


def _add(
    dst: Path, before: Manifest, source: Source, captions: list[list[str]], settings: Settings, made_by: str,
    workers: int | None,
) -> Manifest:  # fmt: skip
    classes, numbers = _merge_classes(before, source)
    entries = make_entries(source, captions)
    if numbers:
        entries = [entry._replace(label=numbers[entry.label]) for entry in entries]
    entries = _with_new_keys(before, entries, source.digest())
    aside = dst / ".extend"
    notes = begin_set(aside, f"{made_by} onto {before.hash}")
    remove_leftovers(aside)
    taken = [int(found[1]) for path in dst.glob("shard-*.tar") if (found := _NUMBER.fullmatch(path.name))]
    jobs = plan(source.root, entries, aside, settings, first_shard=max(taken, default=-1) + 1)
    packed = pack_jobs(aside, jobs, notes, workers)
    shards, members, skipped = sum_up(source, packed)
    texts_left = left_texts(source, packed)
    merged = Manifest(
        dst,
        tuple(sorted((*before.shards, *shards), key=lambda shard: shard.name)),
        classes,
        {name: before.members.get(name, 0) + members.get(name, 0) for name in sorted({*before.members, *members})},
        f"{before.made_by}; {made_by}" if before.made_by else made_by,
    )
    for name, lines in ((SKIPPED, skipped), (SKIPPED_TEXTS, texts_left)):
        if lines:
            former = (dst / name).read_bytes() if (dst / name).exists() else b""
            write_aside(aside / name, former + lines)
    if (dst / CLASSES).exists():
        write_aside(aside / CLASSES, "".join(f"{name}\n" for name in classes).encode())
    write_aside(aside / MANIFEST, merged.to_bytes())  # from here on everything is decided
    _finish_interrupted(dst)
    report(merged, source, skipped, texts_left)
    return merged


def _finish_interrupted(dst: Path) -> None:
    """Move what is complete into place; also what an earlier command could not move any more."""
    aside = dst / ".extend"
    if not (aside / MANIFEST).exists():
        return
    content = (aside / MANIFEST).read_bytes()
    made_by = Manifest.from_bytes(dst, content).made_by
    write_aside(dst / UNFINISHED, json.dumps({"made_by": f"{made_by} --extend"}).encode() + b"\n")
    for path in sorted(aside.iterdir()):
        if path.name not in (MANIFEST, UNFINISHED):
            path.replace(dst / path.name)
    write_aside(dst / MANIFEST, content)
    (dst / UNFINISHED).unlink()
    (aside / UNFINISHED).unlink(missing_ok=True)
    (aside / MANIFEST).unlink()
    aside.rmdir()


def _merge_classes(before: Manifest, source: Source) -> tuple[tuple[str, ...], dict[int, int]]:
    """The classes of both, and old -> new number of the source's labels (empty: they stay). DataError if unclear."""
    labelled = any(label >= 0 for label in source.labels())
    numbered = bool(before.members.get("cls")) and not before.classes
    if not source.classes:
        if labelled and before.classes:
            raise DataError(
                f"{source.path} has numbers for labels, but {before.root} names its classes: give their names"
            )
        if before.members.get("cls") and not labelled:
            tell(f"{source.path} has no labels: its images are added without")
        return before.classes, {}
    if numbered:
        raise DataError(
            f"{before.root} only numbers its classes, so those of {source.path} cannot be matched: write their names "
            f"into {before.root / CLASSES}, one on each line, and delete {before.root / MANIFEST}"
        )
    new = [name for name in source.classes if name not in before.classes]
    if new and before.classes:
        tell(f"{len(new)} new classes ({', '.join(new[:5])}{', ...' if len(new) > 5 else ''})")
    classes = (*before.classes, *new)
    place = {name: number for number, name in enumerate(classes)}
    return classes, {-1: -1} | {number: place[name] for number, name in enumerate(source.classes)}


def _with_new_keys(before: Manifest, entries: list[Entry], text: str) -> list[Entry]:
    """The entries under keys that the set does not have yet."""
    wanted = {entry.key for entry in entries}
    taken: set[str] = set()
    for shard in tqdm(range(len(before.shards)), desc="comparing keys", unit="shard", disable=None, leave=False):
        index = read_index(before.path(shard))
        taken.update(key for i in range(len(index)) if (key := index.key(i)) in wanted)
    if taken:
        tell(f"{len(taken)} keys are in the set already (first: {min(taken)}): if these are the same images, they are "
             "in it twice now; the new ones get other keys")  # fmt: skip
    return [
        entry._replace(key=with_hash(entry.key, f"{text}/{entry.image.name}")) if entry.key in taken else entry
        for entry in entries
    ]
