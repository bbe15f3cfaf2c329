"""How well an objective learns on TIN-40, from the command line, over several seeds: a table for benchmarks/tin40.md.

    python -m benchmarks.tin40 --data /path/to/tin40 --work /tmp/tin40 --configs mae_tin40 --seeds 0 1 2

`--data` holds `train.tar` and `val.tar` (class folders inside) and, for CLIP, `classes.tsv`. Nothing is chosen on the
validation images: the configs are fixed, and the linear probe chooses its strength on a tenth of train. What follows
`--` goes to `trivit pretrain`, as in `... --seeds 0 -- --trainer.precision bf16-mixed`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

TRIVIT = [sys.executable, "-m", "pretrain.cli"]
PROBES = {"knn": "kNN k=20", "linear": "linear", "zeroshot": "zero-shot"}


def main() -> None:
    """Pack, pretrain and evaluate every config with every seed; finished parts are not done again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--configs", nargs="+", default=["mae_tin40"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("options", nargs="*", help="of trivit pretrain, after --")
    arguments = parser.parse_args()
    train, test = arguments.work / "train", arguments.work / "val"
    run("shards", "pack", arguments.data / "train.tar", train)
    run("shards", "pack", arguments.data / "val.tar", test)
    print("| config | seed | " + " | ".join(PROBES.values()) + " |\n|---|---|" + "---:|" * len(PROBES))
    for config in arguments.configs:
        names = ["--data.recipe.captions.class_names", arguments.data / "classes.tsv"] if "clip" in config else []
        options = [*names, *arguments.options]
        rows = [score(config, seed, train, test, arguments.work, options) for seed in arguments.seeds]
        for seed, row in zip(arguments.seeds, rows, strict=True):
            print(f"| {config} | {seed} | " + " | ".join(f"{row[p]:.1f}" if p in row else "-" for p in PROBES) + " |")
        means = {probe: statistics.mean(row[probe] for row in rows) for probe in rows[0]}
        cells = " | ".join(f"**{means[probe]:.1f}**" if probe in means else "-" for probe in PROBES)
        print(f"| {config} | mean | {cells} |", flush=True)


def score(config: str, seed: int, train: Path, test: Path, work: Path, options: list[object]) -> dict[str, float]:
    """Top-1 in percent of each probe, for one run; `options`: of trivit pretrain, besides those of every run."""
    output = work / f"{config}_seed{seed}"
    results = output / "results.json"
    if not results.exists():
        run("pretrain", "--config", config, "--seed", seed, "--data.train", train, "--output", output, *options)
        probes = "knn,linear,zeroshot" if "clip" in config else "knn,linear"
        run("evaluate", output, "--train", train, "--test", test, "--probes", probes)
    found = json.loads(results.read_text())
    return {probe: float(found[probe]["top1"]) for probe in PROBES if probe in found}


def run(*arguments: object) -> None:
    """One `trivit` command; its own output goes to stderr, so that stdout holds the table alone."""
    subprocess.run([*TRIVIT, *map(str, arguments)], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
