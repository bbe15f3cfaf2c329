"""The machine that `trivit doctor` runs on: versions, cores, memory, GPUs, disk, limits."""

import importlib.util
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from datamodules.workers import available_cores
from pretrain.findings import GIB, Finding

EXTRAS = {"wandb": "--wandb", "faiss": "kNN on the CPU", "open_clip": "CLIP", "cv2": "colours in workers"}
FEWEST_FILES = 1024
"""A rank has up to lanes x (window + 1) shards open, and a socket for each worker."""


def machine(output: Path | None) -> Iterator[Finding]:
    """What is here; `output`: the folder that a run would write to, None: it has no name yet."""
    names = ("torch", "lightning", "timm", "webdataset")
    yield Finding("ok", f"Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names))
    missing = [f"{name} ({use})" for name, use in EXTRAS.items() if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding("note", f"not installed: {', '.join(missing)}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("ok", f"{available_cores()} CPU cores for this process, {memory:.1f} GiB memory")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield Finding("ok", f"GPU {i}: {properties.name}, {properties.total_memory / GIB:.1f} GiB")
    if not torch.cuda.is_available():
        yield Finding("note", "no GPU that torch can use: a run on this machine trains on the CPU")
    wanted = (output or Path.cwd()).absolute()
    place = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Finding("wrong", f"{place} cannot be written to: name another --output")
    else:
        yield Finding(
            "ok", f"{shutil.disk_usage(place).free / GIB:,.0f} GiB free for {output or 'a run in this folder'}"
        )
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < min(FEWEST_FILES, most):
        yield Finding("wrong", f"only {files} files may be open at once: ulimit -n {FEWEST_FILES}")
    if shutil.which("sbatch"):
        yield Finding("ok", "SLURM is here: trivit slurm submit")
