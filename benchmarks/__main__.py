"""`make bench`: every ratio in one table, each measured in turns within one run."""

import argparse
from pathlib import Path

import torch

from benchmarks import bytes_only, clip_step, dino_step, loader, mae_step, overhead, probes, scale
from benchmarks.table import show, write


def main() -> None:
    """Print the table and write the JSON beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/latest.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    parts = (overhead, mae_step, clip_step, dino_step, loader, bytes_only, scale, probes)
    rows = [row for part in parts for row in part.measure()]
    print(show(rows))
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
