"""Two processes against one: `trivit pretrain` under torchrun with DDP over gloo, one thread each.

The same global batch on one rank and on two. Efficiency is the speed of two over twice that of one; the share of time
that only waits for the other's gradients is DDP's own count, as in metrics.csv. Two runs beside each other, each with a
rank's part of the batch, show what is lost without any communication, because two busy cores are slower than one. On a
machine of two cores the loader's workers would share them, so the runs load in their own process.

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
BATCH, STEPS, WARM_ROWS = 64, 10, 2


def measure(rounds: int = 1) -> list[Row]:
    """Images/s of two ranks against twice those of one, for each objective, and what two apart reach of that."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        synth(data, samples=1024, size=64, seed=0)
        for config in CONFIGS:
            alone, two, apart, waiting = [], [], [], []
            for turn in range(rounds):
                place = Path(folder) / f"{config}{turn}"
                alone.append(_finish(_start(config, data, place / "one", 1, BATCH))[0])
                rate, share = _finish(_start(config, data, place / "two", 2, BATCH))
                two.append(rate)
                waiting.append(share)
                both = [_start(config, data, place / f"apart{i}", 1, BATCH // 2) for i in range(2)]
                apart.append(sum(_finish(each)[0] for each in both))
            told, ideal = f"{config}, 2 ranks against 2 x 1", [2 * rate for rate in alone]
            row = compared("ranks", told, "images/s", two, ideal, "one process, twice")
            share, reached = statistics.median(waiting), statistics.median(apart) / row.baseline
            note = f"{share:.1%} of the time waits for gradients; two runs apart reach {reached:.2f}"
            rows.append(replace(row, note=note))
    return rows


def _start(config: str, data: Path, output: Path, ranks: int, batch: int) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "pretrain.cli", "pretrain", "--config", config, "--data.train", str(data), "--output", str(output),
               "--data.global_batch_size", str(batch), "--data.device_batch_size", str(batch), "--data.workers", "0",
               "--trainer.devices", str(ranks), "--trainer.strategy", "ddp" if ranks > 1 else "auto",
               "--trainer.max_steps", str(STEPS), "--model.warmup_steps", "2", "--log_every", "2",
               "--trainer.accelerator", "cpu"]  # fmt: skip
    if config.startswith("dino"):
        command += ["--model.freeze_last_layer_epochs", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True), output


def _finish(started: tuple[subprocess.Popen[str], Path]) -> tuple[float, float]:
    """Images/s, and the share of time that waits for gradients."""
    process, output = started
    if process.wait():
        raise RuntimeError(f"{process.args!r}\n{output.with_suffix('.log').read_text()[-3000:]}")
    metrics = read_run(output).metrics
    rate = statistics.median(metrics["train/images_per_second"][WARM_ROWS:].tolist())
    shares = metrics.get("time/communication")
    return rate, 0.0 if shares is None else statistics.median(shares[WARM_ROWS:].tolist())


def main() -> None:
    """Print the table."""
    print(show(measure(rounds=3)))


if __name__ == "__main__":
    main()
