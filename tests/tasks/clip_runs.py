"""A tiny CLIP, random pairs, and a Trainer that runs it for some steps in about a second."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datamodules.shard_datamodule import Layout
from tasks.clip_task import CLIPTask
from tasks.encoder_config import EncoderConfig
from tasks.text_tower import TextConfig

TINY = EncoderConfig(
    arch="vit_tiny", width=24, depth=2, heads=2, image_size=16, patch_size=4, positions="learned",
    position_resize="open_clip", pre_norm=True, norm_eps=1e-5, pool="cls", drop_path=0.3,
)  # fmt: skip
TEXT = TextConfig(context_length=8, vocab_size=50, width=16, depth=2, heads=2)


def tiny_task(encoder: EncoderConfig = TINY, text: TextConfig = TEXT, **changes: Any) -> CLIPTask:
    torch.manual_seed(0)
    return CLIPTask(encoder, text, **{"joint_width": 12, "lr": 1e-2, **changes})


def pairs(
    count: int, seed: int = 0, size: int = 16, length: int = 8, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Images, ids that end with the largest one, and keys."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=draw, dtype=torch.float64)
    ids = torch.randint(1, 48, (count, length), generator=draw)
    ends = torch.randint(2, length, (count,), generator=draw)
    ids[torch.arange(length) > ends[:, None]] = 0
    ids[torch.arange(count), ends] = 49
    return [images.to(dtype), ids, torch.arange(count) * 1009 + seed]


class Pairs(LightningDataModule):
    """Random pairs, the same for a step on any number of ranks; goes on where the Trainer is."""

    seed = 0
    steps_per_epoch = 2

    def __init__(self, batch: int = 8, micro_batch: int | None = None, size: int = 16) -> None:
        super().__init__()
        self.global_batch_size, self.micro_batch, self.size = batch, micro_batch or batch, size

    def layout(self, world_size: int) -> Layout:
        rank_batch = self.global_batch_size // world_size
        micro_batch = min(self.micro_batch, rank_batch)
        return Layout(rank_batch, micro_batch, rank_batch // micro_batch)

    def train_dataloader(self) -> "Loader":
        assert self.trainer is not None
        return Loader(self, self.trainer.global_step, self.trainer.max_steps)


class Loader:
    def __init__(self, data: Pairs, start: int, stop: int) -> None:
        self.data, self.start, self.stop = data, start, stop

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer = self.data.trainer
        assert trainer is not None
        for step in range(self.start, self.stop):
            mine = torch.arange(self.data.global_batch_size).chunk(trainer.world_size)[trainer.global_rank]
            parts = pairs(self.data.global_batch_size, step, self.data.size)
            yield {name: part[mine] for name, part in zip(("image", "text", "rng"), parts, strict=True)}


def fit(
    task: CLIPTask, steps: int, data: Pairs | None = None, callbacks: list[Callback] | None = None,
    ckpt_path: Path | None = None, **settings: Any,
) -> Trainer:  # fmt: skip
    own: dict[str, Any] = {"accelerator": "cpu", "max_epochs": -1, "logger": False, "enable_checkpointing": False}
    own |= {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": callbacks}
    trainer = Trainer(max_steps=steps, **{**own, **settings})
    trainer.fit(task, datamodule=data or Pairs(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors made within it that existed at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return
        self._seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, place, size)

    def _remove(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def peak_bytes(function: Callable[[], Any]) -> int:
    with PeakBytes() as peak:
        function()
    return peak.peak
