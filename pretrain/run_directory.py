"""The folder of one run: whose it is, whether it is finished, and what may change when it goes on.

config.yaml   metrics.csv   checkpoints/last.ckpt   bad_samples.jsonl   skipped.tsv   samples.jsonl   results.json
report.html
"""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from datamodules.manifest import SKIPPED
from pretrain.checkpoint_files import find_checkpoint
from pretrain.checkpoints import read_checkpoint
from pretrain.errors import RunError
from pretrain.run_lock import RunLock
from pretrain.run_place import check_ours, check_writable

# What does not change what is learned: where and how fast it runs, and how often it reports. `data.train` may move,
# because the manifest hash in the checkpoint still tells whether it is the same data; so may a vocabulary, all of which
# is in the checkpoint.
MAY_CHANGE = (
    "output", "allow_changes", "checkpoint_every", "checkpoint_async", "log_every", "log_keys", "start_timeout",
    "step_timeout", "wandb", "probe", "data.train", "model.text.tokenizer", "data.workers", "data.device_batch_size",
    "data.bad_sample_budget",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.benchmark",
    "model.compile_blocks", "model.activation_checkpointing", "float32_matmul",
)  # fmt: skip


class RunDirectory:
    """`--output`: created, or checked to be the run that this command means."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.samples = path / "samples.jsonl"
        self.bad_samples = path / "bad_samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self._lock = RunLock(path)
        self._created = False

    def claim(self) -> None:
        """Create the folder and lock it; RunError when it is something else's or another process trains in it.

        Only the first rank of a run locks; the others would be refused by their own first one.
        """
        check_ours(self.path)
        if launched_rank() != 0:
            return
        try:
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"--output {self.path}: this folder cannot be made ({error.strerror}); name another one"
            ) from error
        check_writable(self.path)
        self._lock.take()

    def release(self) -> None:
        """Let another process train here; a folder that we made and in which nothing happened is removed."""
        if not self._lock.taken:
            return
        self._lock.release()
        if self._created:
            with contextlib.suppress(OSError):  # it is not empty, or somebody has begun in it since
                self.path.rmdir()

    def write_config(self, text: str) -> None:
        """Write config.yaml aside and rename it."""
        aside = self.path / "config.yaml.part"
        aside.write_text(text)
        aside.replace(self.config)

    def keep_skipped(self, root: Path) -> None:
        """Copy the list of images that could not be packed: the set may lie in a cache, and the report names them."""
        if (root / SKIPPED).is_file():
            shutil.copyfile(root / SKIPPED, self.path / SKIPPED)

    def wandb_id(self) -> str:
        """The same for every process that trains in this folder, so that a resumed run stays one run in wandb."""
        return hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:12]

    def has_trained(self) -> bool:
        """Whether a step was taken here: before that, as after a refused start, a corrected command begins anew."""
        rows = self.metrics.read_text(errors="replace").splitlines()[1:] if self.metrics.is_file() else []
        return bool(rows) or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def checkpoint(self) -> tuple[Path, dict[str, Any], list[str]] | None:
        """The newest whole checkpoint, what it holds, and what is wrong with newer ones; None before the first one.

        RunError when there are some and none is whole.
        """
        path, findings = find_checkpoint(self.checkpoints)
        return None if path is None else (path, read_checkpoint(path), findings)

    def check_same_run(self, config: dict[str, Any], allowed: list[str]) -> None:
        """RunError when `config` differs from the saved one in a key that changes what is learned.

        Keys under a prefix in `allowed` may differ too: the user said so.
        """
        try:
            saved = flatten(yaml.safe_load(self.config.read_text()))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(
                f"{self.config} is damaged; restore it, or remove it to go on with the new settings"
            ) from error
        now = flatten(config)
        free = (*MAY_CHANGE, *allowed)
        changed = [
            key
            for key in sorted(saved.keys() | now.keys())
            if saved.get(key) != now.get(key) and not any(key == f or key.startswith(f + ".") for f in free)
        ]
        if changed:
            what = "; ".join(f"{key}: {saved.get(key)} -> {now.get(key)}" for key in changed[:5])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            allow = ",".join(changed if len(changed) <= 5 else ["model", "data", "trainer"])
            raise RunError(
                f"{self.path} is a run with other settings ({what}{more}); name another --output, or go on with the "
                f"new ones by --allow_changes '[{allow}]'"
            )


def launched_rank() -> int:
    """Rank of this process as its launcher (torchrun, srun, Lightning) says, before there is a process group.

    What Lightning or torchrun start within a job has the SLURM_PROCID of the shell or batch script that they were
    started from, and not its own. Lightning alone, on several nodes, does not say how many processes each has; then
    only the number of the very first one, 0, is sure to be its rank.
    """
    rank, task = _number("RANK"), _number("SLURM_PROCID")
    local, node = _number("LOCAL_RANK"), _number("NODE_RANK")
    if rank is not None:
        return rank
    if task is not None and local in (None, _number("SLURM_LOCALID")):
        return task
    return (local or 0) + (node or 0) * (_number("LOCAL_WORLD_SIZE") or 1)


def srun_started() -> bool:
    """Whether srun has started the ranks: not torchrun within a job, nor Lightning from an interactive shell."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not interactive and "TORCHELASTIC_RUN_ID" not in os.environ


def launched_ranks() -> int | None:
    """How many processes torchrun or srun has started; None where neither did, or it does not say."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") if srun_started() else None
    started = os.environ.get("WORLD_SIZE") or tasks
    return int(started) if started else None


def _number(name: str) -> int | None:
    """Of the environment; None where there is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; `init_args` does not show, as on the command line."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        flat |= flatten(value, path)
    return flat
