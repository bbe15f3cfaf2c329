"""Training steps on one GPU: ours, eager and compiled, against plain PyTorch with AMP; then the program from tars.

Nothing is downloaded: images are random, or drawn into tars. bfloat16 autocast, on both sides. Steps take turns within
one run; a turn ends when the device has done all of it. MFU: FLOPs of the model by torch's counter
(`pretrain/cost.py`), nothing computed twice, over the dense bfloat16 peak of the device. End to end the whole `trivit
pretrain` reads tars of 256-pixel JPEGs; its shares of time come from metrics.csv.

Run: make bench-gpu OBJECTIVE=mae|dino|clip        (python -m benchmarks.gpu --objective mae --json mae.json)
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import clip_step, dino_step, mae_step
from benchmarks.steps import TaskStep
from datamodules.synth import synth
from evaluation.run_files import read_run
from evaluation.time_shares import time_shares
from pretrain.checks import fill_in
from pretrain.config import parse
from pretrain.cost import step_cost
from pretrain.hardware import gpu_here
from pretrain.run import train

BFLOAT16 = torch.bfloat16
COMPILED = ("--model.compile_blocks", "true")
Side = Callable[[], object]


class Setting(NamedTuple):
    """One model: the setting of the CPU benchmark that builds both sides, and what it is called."""

    name: str
    sizes: Any
    ours: Callable[..., TaskStep]
    plain: Callable[[Any], Side]


def _mae(name: str, config: str, size: tuple[int, int, int], batch: int) -> Setting:
    return Setting(name, mae_step.Setting(name, config, (), size, 224, batch), mae_step.ours, mae_step.plain)


def _dino(name: str, config: str, size: tuple[int, int, int], batch: int) -> Setting:
    views = (224, 96, 8)
    return Setting(name, dino_step.Setting(name, config, size, views, batch), dino_step.ours, dino_step.plain)


_CLIP = {"embed_dim": 512, "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
         "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}}  # fmt: skip
SETTINGS = {
    "mae": [
        _mae("MAE ViT-B/16, batch 512", "mae_vitb16_in1k", (768, 12, 12), 512),
        _mae("MAE ViT-L/16, batch 256", "mae_vitl16_in1k", (1024, 24, 16), 256),
    ],
    "dino": [
        _dino("DINO ViT-S/16, 2x224 + 8x96, batch 128", "dino_vits16_in1k", (384, 12, 6), 128),
        _dino("DINO ViT-B/16, 2x224 + 8x96, batch 64", "dino_vitb16_in1k", (768, 12, 12), 64),
    ],
    "clip": [
        Setting("CLIP ViT-B/16, batch 512, 77 ids", clip_step.Setting("", "clip_vitb16", (), _CLIP, 512, (80, 80)),
                clip_step.ours, clip_step.theirs),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Of one side of a setting. `mfu`: None where the peak is not known; `memory`: GiB; `shares`: of the program."""

    setting: str
    side: str
    images_per_second: float
    milliseconds: float
    mfu: float | None
    memory: float | None
    shares: dict[str, float] | None = None


def measure(setting: Setting, device: str, rounds: int, steps: int) -> list[Result]:
    """Eager and compiled steps of ours and the plain loop, in turns."""
    makers: dict[str, Callable[[], Side]] = {
        "trivit": lambda: setting.ours(setting.sizes, device=device, autocast=BFLOAT16).step,
        "trivit, compiled": lambda: setting.ours(setting.sizes, *COMPILED, device=device, autocast=BFLOAT16).step,
        "plain PyTorch, AMP": lambda: _under_autocast(setting.plain(setting.sizes), device),
    }
    sides, memory = {}, {}
    for name, make in makers.items():
        with torch.device(device):
            sides[name], memory[name] = _build(make, device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        order = list(sides)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            _wait(device)
            start = time.perf_counter()
            for _ in range(steps):
                sides[name]()
            _wait(device)
            seconds[name].append((time.perf_counter() - start) / steps)
    each = _flops(setting)
    batch = setting.sizes.batch
    return [
        _result(setting.name, name, batch / statistics.median(spent), batch, each, memory[name])
        for name, spent in seconds.items()
    ]


def end_to_end(setting: Setting, device: str, steps: int, samples: int, options: Sequence[str] = ()) -> Result:
    """The whole program, compiled, from tars that are drawn for it."""
    batch = setting.sizes.batch
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "train", Path(folder) / "run"
        synth(data, samples=samples, size=256, seed=0)
        cli, config = parse([
            "--config", setting.sizes.config, "--data.train", str(data), "--output", str(run), *COMPILED,
            "--data.global_batch_size", str(batch), "--data.device_batch_size", str(batch),
            "--trainer.precision", "bf16-mixed", "--trainer.max_steps", str(steps), "--epochs", "null",
            "--trainer.accelerator", "gpu" if device == "cuda" else "cpu", "--trainer.devices", "1",
            "--log_every", str(max(1, steps // 6)), *options,
        ])  # fmt: skip
        train(cli, config)
        found = read_run(run)
    rates = found.metrics["train/images_per_second"][2:]  # compiling and the start of workers are over
    memory = float(found.metrics["train/peak_memory"][-1])
    shares = time_shares(found)
    rate = float(statistics.median(rates.tolist()))
    return _result(setting.name, "trivit pretrain, from tars", rate, batch, _flops(setting, options), memory, shares)


def _build(make: Callable[[], Side], device: str) -> tuple[Side, float | None]:
    """A side that has taken its first steps, and the GiB that it needed for them."""
    if device != "cuda":
        side = make()
        side()
        return side, None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side = make()
    for _ in range(4):  # compiling, moments, the allocator's blocks
        side()
    _wait(device)
    return side, (torch.cuda.max_memory_allocated() - before) / 2**30


def _under_autocast(step: Side, device: str) -> Side:
    def run() -> None:
        with torch.autocast(device, BFLOAT16):
            step()

    return run


def _flops(setting: Setting, options: Sequence[str] = ()) -> float:
    """Of an image."""
    more = getattr(setting.sizes, "options", ())
    cli, config = parse(["--config", setting.sizes.config, "--output", "none", "--data.train", "none", *more, *options])
    fill_in(config)
    cost = step_cost(cli, config, 8)
    return cost.flops / cost.images


def _result(
    setting: str, side: str, rate: float, batch: int, flops: float, memory: float | None,
    shares: dict[str, float] | None = None,
) -> Result:  # fmt: skip
    gpu = gpu_here()
    mfu = rate * flops / (gpu.tflops * 1e12) if gpu else None
    return Result(setting, side, rate, 1e3 * batch / rate, mfu, memory, shares)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def show(results: Sequence[Result]) -> str:
    """A Markdown table; ratios are to the plain loop of the same setting."""
    plain = {r.setting: r.images_per_second for r in results if r.side.startswith("plain")}
    lines = ["| setting | side | images/s | ms a step | MFU | GiB | ratio |", "|---|---|---:|---:|---:|---:|---:|"]
    for r in results:
        mfu = "-" if r.mfu is None else f"{r.mfu:.1%}"
        memory = "-" if r.memory is None else f"{r.memory:.1f}"
        ratio = r.images_per_second / plain[r.setting]
        speed = f"{r.images_per_second:,.0f} | {r.milliseconds:.1f}"
        lines.append(f"| {r.setting} | {r.side} | {speed} | {mfu} | {memory} | {ratio:.2f} |")
    lines += [
        f"\nTime of {r.setting}, {r.side}: " + ", ".join(f"{phase} {share:.1%}" for phase, share in r.shares.items())
        for r in results
        if r.shares
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table and write the JSON, after each setting, so that what is measured is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=list(SETTINGS), required=True)
    parser.add_argument("--json", type=Path, help="default: benchmarks/gpu_OBJECTIVE.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--end-to-end", type=int, default=120, metavar="STEPS", help="0: not at all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.gpu: no GPU that torch can use; make bench runs on the CPU\n")
    torch.set_float32_matmul_precision("high")  # as a run does
    results: list[Result] = []
    for setting in SETTINGS[arguments.objective]:
        results += measure(setting, "cuda", arguments.rounds, arguments.steps)
        if arguments.end_to_end:
            torch.cuda.empty_cache()
            results.append(end_to_end(setting, "cuda", arguments.end_to_end, samples=8192))
        facts = {
            "date": date.today().isoformat(), "device": torch.cuda.get_device_name(),
            "versions": {name: version(name) for name in ("torch", "timm", "lightning")},
            "results": [asdict(result) for result in results],
        }  # fmt: skip
        (arguments.json or Path(f"benchmarks/gpu_{arguments.objective}.json")).write_text(json.dumps(facts, indent=1))
        print(show(results), flush=True)


if __name__ == "__main__":
    main()
