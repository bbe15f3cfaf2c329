"""Reading a whole set of shards and telling what is wrong with it and where."""

import json
import os
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.class_labels import LABEL
from datamodules.console import table, tell
from datamodules.manifest import MANIFEST, Manifest, list_tars
from datamodules.open_shards import named_tars
from datamodules.sidecars import read_sidecar
from datamodules.tar_index import Finding, scan_tar
from datamodules.verify_shard import CAPTION, ShardToVerify, VerifiedShard, verify_shard
from datamodules.workers import spread

_MOST_ROWS = 100


def verify(root: str | os.PathLike[str], *, workers: int | None = None) -> list[Finding]:
    """Read every byte of the shards in `root`; everything that is wrong, in the order of the shards.

    Checked are tar headers and their checksums, the end of each tar, the index and the manifest against the tars,
    the checksums of the members (shards of our writer have them), labels, captions, JSON, masks, whether each image
    can be decoded, and that no key and no content occurs twice.

    Raises:
        DataError: when there is no such folder, no tar in it, or the set is unfinished.
    """
    root = named_tars(root) or Path(root)
    tars = list_tars(root)
    findings, manifest = _stored_manifest(root)
    listed = {shard.name: shard for shard in manifest.shards} if manifest else {}
    classes = {name: number for number, name in enumerate(manifest.classes)} if manifest else None
    for name in sorted(set(listed) - set(tars)):
        detail = f"with {listed[name].samples} samples; {MANIFEST} lists it"
        findings.append(Finding(name, "", "missing shard", detail))
    if manifest:
        findings += [
            Finding(name, "", "differs from manifest", "not listed") for name in sorted(set(tars) - set(listed))
        ]
    import_module("datamodules.decode")  # once here, so that no worker has to import torch for itself
    tasks = [ShardToVerify(root / name, listed.get(name), classes) for name in sorted(tars)]
    verified: dict[str, VerifiedShard] = {}
    with tqdm(
        total=sum(tar.st_size for tar in tars.values()), desc="verifying", unit="B", unit_scale=True, disable=None
    ) as bar:
        for task, result in spread(verify_shard, tasks, workers=workers, tick=bar.update):
            verified[task.path.name] = result
    for name in sorted(verified):
        findings += verified[name].findings
    findings += _lacking(root, verified)
    findings += _repeated(root, verified)
    return findings


def verify_command(root: str | os.PathLike[str]) -> int:
    """Verify and print what is wrong as a table; 0 when nothing is, 1 otherwise."""
    findings = verify(root)
    if not findings:
        tell(f"{root}: clean")
        return 0
    counts = Counter(finding.kind for finding in findings)
    most = max(1, _MOST_ROWS // len(counts))  # so that one frequent kind does not hide the others
    seen = Counter[str]()
    shown = []
    for finding in findings:
        seen[finding.kind] += 1
        if seen[finding.kind] <= most:
            shown.append(finding)
    print(table(("shard", "key", "what", "detail"), shown))
    if len(findings) > len(shown):
        print(f"... and {len(findings) - len(shown)} more")
    print(f"\n{table(('what', 'count'), counts.most_common())}")
    return 1


def _stored_manifest(root: Path) -> tuple[list[Finding], Manifest | None]:
    """The manifest as it lies there, and what is wrong with it; there need not be one."""
    findings: list[Finding] = []
    for place, data in read_sidecar(root / MANIFEST):
        try:
            return findings, Manifest.from_bytes(root, data)
        except ValueError as error:
            detail = "not JSON" if isinstance(error, json.JSONDecodeError) else f"{error}"
            findings.append(Finding(place.name, "", "damaged manifest", f"{detail}; delete it, it will be made anew"))
    return findings, None


def _lacking(root: Path, verified: dict[str, VerifiedShard]) -> list[Finding]:
    """Samples without what most of the others have."""
    total = sum(result.samples for result in verified.values())
    findings = []
    for extension, kind in ((LABEL, "no label"), (CAPTION, "no caption")):
        if 2 * sum(result.present[extension] for result in verified.values()) > total:
            for name in sorted(verified):
                if verified[name].present[extension] < verified[name].samples:
                    index = scan_tar(root / name)
                    findings += [
                        Finding(name, index.key(i), kind, f"most samples have a .{extension}")
                        for i in range(len(index))
                        if extension not in index.members(i)
                    ]
    return findings


def _repeated(root: Path, verified: dict[str, VerifiedShard]) -> list[Finding]:
    """Keys that occur in several shards (within one, the index finds them), and samples of the same content."""
    names = sorted(verified)
    shards = np.repeat(np.arange(len(names)), [verified[name].samples for name in names])
    rows = np.concatenate([np.arange(verified[name].samples) for name in names])
    findings = []
    for kind, hashes in (
        ("repeated key", np.concatenate([verified[name].keys for name in names])),
        ("repeated sample", np.concatenate([verified[name].contents for name in names])),
    ):
        groups = _groups(hashes)
        indexes = {
            shard: scan_tar(root / names[shard]) for shard in {int(shards[i]) for group in groups for i in group}
        }
        places = [[(names[shards[i]], indexes[int(shards[i])].key(int(rows[i]))) for i in group] for group in groups]
        for (first_shard, first_key), *others in places:
            for name, key in others:
                if kind == "repeated sample":
                    findings.append(Finding(name, key, kind, f"the same content as {first_shard}/{first_key}"))
                elif name != first_shard:
                    findings.append(Finding(name, key, kind, f"{first_shard} has it, too"))
    return findings


def _groups(hashes: NDArray[np.uint64]) -> list[list[int]]:
    """Positions of equal values, each group in ascending order."""
    values, counts = np.unique(hashes, return_counts=True)
    groups: dict[int, list[int]] = defaultdict(list)
    for i in np.flatnonzero(np.isin(hashes, values[counts > 1])):
        groups[int(hashes[i])].append(int(i))
    return list(groups.values())
