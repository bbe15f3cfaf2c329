"""Two processes against one: `trivit pretrain` under torchrun with DDP over gloo, one thread each.

The same global batch on one rank and on two, in turns. Efficiency is the speed of two over twice that of one; the share
of time that only waits for the other's gradients is DDP's own count, as in metrics.csv. On a machine of two cores the
loader's workers would share them, so the runs load in their own process.

Run: python -m benchmarks.ranks
"""

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.table import Row, compared, show
from datamodules.synth import synth
from evaluation.run_files import read_run

CONFIGS = ("mae_tin40", "dino_tin40", "clip_tin40")
STEPS, WARM_ROWS = 12, 2


def measure(rounds: int = 2) -> list[Row]:
    """Images/s of both, and the share of communication in percent (against none), for each objective."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        synth(data, samples=1024, size=64, seed=0)
        for config in CONFIGS:
            found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
            for turn in range(rounds):
                for ranks in (1, 2):
                    found[ranks].append(_run(config, data, Path(folder) / f"{config}{ranks}_{turn}", ranks))
            waiting = statistics.median(share for _, share in found[2])
            told = f"{config}, 2 ranks against 2 x 1"
            two, ideal = [rate for rate, _ in found[2]], [2 * rate for rate, _ in found[1]]
            row = compared("ranks", told, "images/s", two, ideal, "two processes that need not talk")
            rows.append(replace(row, note=f"{waiting:.1%} of the time waits for gradients"))
    return rows


def _run(config: str, data: Path, output: Path, ranks: int) -> tuple[float, float]:
    """Images/s, and the share of time that waits for gradients."""
    batch = "64"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "pretrain.cli", "pretrain", "--config", config, "--data.train", str(data), "--output", str(output),
               "--data.global_batch_size", batch, "--data.device_batch_size", batch, "--data.workers", "0",
               "--trainer.devices", str(ranks), "--trainer.strategy", "ddp" if ranks > 1 else "auto",
               "--trainer.max_steps", str(STEPS), "--model.warmup_steps", "2", "--log_every", "2",
               "--trainer.accelerator", "cpu"]  # fmt: skip
    if config.startswith("dino"):
        command += ["--model.freeze_last_layer_epochs", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    metrics = read_run(output).metrics
    rate = statistics.median(metrics["train/images_per_second"][WARM_ROWS:].tolist())
    shares = metrics.get("time/communication")
    return rate, 0.0 if shares is None else statistics.median(shares[WARM_ROWS:].tolist())


def main() -> None:
    """Print the table."""
    print(show(measure()))


if __name__ == "__main__":
    main()
