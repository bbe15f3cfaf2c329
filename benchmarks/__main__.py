"""`make bench`: every ratio in one table, each measured in turns within one run."""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import (
    bytes_only,
    checkpoint,
    clip_step,
    dino_step,
    loader,
    mae_step,
    measuring,
    overhead,
    probes,
    ranks,
    scale,
)  # fmt: skip
from benchmarks.table import show, write


def main() -> None:
    """Print the rows of each part as soon as they are there, then all of them; write the JSON beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/latest.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    parts = (overhead, measuring, mae_step, clip_step, dino_step, loader, bytes_only, scale, probes, ranks, checkpoint)
    rows = []
    for part in tqdm(parts, desc="bench", unit="part", disable=None):
        start = time.perf_counter()
        rows += (found := part.measure())
        tqdm.write(f"{show(found)}\n{part.__name__}: {time.perf_counter() - start:.0f} s")
        write(rows, arguments.json)
    print(show(rows))


if __name__ == "__main__":
    main()
