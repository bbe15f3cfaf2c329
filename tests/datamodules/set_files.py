"""A set of shards as tests compare it: by sample, as webdataset reads it, and by file."""

from pathlib import Path

import webdataset


def read(root: Path) -> dict[str, dict[str, bytes]]:
    """Key -> members, as webdataset reads them."""
    urls = [str(path) for path in sorted(root.glob("*.tar"))]
    stream = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return {s["__key__"]: {name: data for name, data in s.items() if name[0] != "_"} for s in stream}


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}
