"""The LightningDataModule of every objective: shards to normalised batches, and the state to resume from."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, Trainer

from datamodules.bad_samples import BadSamples
from datamodules.color_batch import change_colors
from datamodules.errors import DataError
from datamodules.loader import check_workers, default_workers
from datamodules.manifest import SKIPPED, Manifest, load_manifest, skipped_images
from datamodules.normalize import IMAGENET_MEAN, IMAGENET_STD, check_channels, normalize
from datamodules.open_shards import open_shards
from datamodules.order import Order
from datamodules.prefetch import TrainAhead
from datamodules.recipes import Recipe
from datamodules.remote import check_url, is_remote
from datamodules.shard_reader import ShardReader
from datamodules.stream import StepLoader, TrainStream


class Layout(NamedTuple):
    """How a global batch is shared: per rank and optimiser step, per rank and forward pass, and how many of those."""

    rank_batch: int
    micro_batch: int
    accumulate: int


class ShardDataModule(LightningDataModule):
    """Training batches, the same ones on any number of ranks and workers.

    Args:
        train: shards: a folder, its URL (http, https, s3, gs), or tars in brace notation; a folder or tar of images is
            packed into the cache first.
        recipe: the augmentation.
        global_batch_size: samples of one optimiser step over all ranks.
        device_batch_size: the most samples that one device holds; more are accumulated.
        seed: of order and augmentation.
        lanes: see `order`; None takes the largest divisor of the global batch size up to 64.
        window: shards that are shuffled together in a lane.
        workers: loader processes of a rank; 0 loads in the main process, None goes by the cores.
        bad_sample_budget: largest share of samples that may be bad before the run stops.
        mean, std: of the pixels, for normalisation, in [0, 1], one per channel (`trivit shards stats` finds them).
        channels: of the images; grey and colour files are converted, any other number must be that of the files.
        bits: 8, or 16: read the full precision of 16-bit files.

    After `setup`, `num_skipped` is the number of images that could not be packed, so that they are not in the set.
    Attributes to set before fitting: `bad_samples_file` names the bad samples, `tokenize` makes tokens of captions,
    with `whole_batches` a rank gets all of an optimiser step at once (the task itself cuts it into micro-batches), with
    `allow_changes` a checkpoint of another order is taken where it names what differs (`data.train`, `data.seed`,
    `data.global_batch_size`, `data.lanes`, `data.window`, or `data` for all), and `on_failure` lets all ranks stop
    together when one cannot go on.

    Raises:
        DataError: here or in `setup`, for numbers that do not fit each other, the data or the Trainer.
    """

    def __init__(
        self, train: str, recipe: Recipe, global_batch_size: int, device_batch_size: int = 256, seed: int = 0,
        lanes: int | None = None, window: int = 4, workers: int | None = None, bad_sample_budget: float = 0.01,
        mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD, channels: int = 3,
        bits: Literal[8, 16] = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        if is_remote(train):
            check_url(train)  # first of all: later messages quote it
        for name, value in (("global_batch_size", global_batch_size), ("device_batch_size", device_batch_size)):
            if value < 1:
                raise DataError(f"{name} {value} must be at least 1")
        if not 0 <= bad_sample_budget <= 1:
            raise DataError(f"bad_sample_budget {bad_sample_budget} is a share: it must be between 0 and 1")
        check_channels(channels, bits, mean, std, train)
        check_workers(workers)
        self.train, self.recipe = train, recipe
        self.global_batch_size, self.device_batch_size = global_batch_size, device_batch_size
        self.seed, self.lanes, self.window, self.workers = seed, lanes, window, workers
        self.bad_sample_budget, self.mean, self.std = bad_sample_budget, mean, std
        self.channels, self.bits = channels, bits
        self.bad_samples_file: Path | None = None
        self.tokenize: Callable[[list[str]], torch.Tensor] | None = None
        self.whole_batches = False
        self.allow_changes: Collection[str] = ()
        self.on_failure: Callable[[DataError], None] | None = None
        self.bad_samples: BadSamples | None = None
        self.num_skipped = 0
        self._order: Order | None = None
        self._manifest: Manifest | None = None

    def layout(self, world_size: int) -> Layout:
        """Share the global batch: the fewest micro-batches of one size that fit on a device.

        Raises:
            DataError: when it is not divisible, or only into micro-batches of less than half of what fits.
        """
        b = self.global_batch_size
        if b % world_size:
            below, above = b // world_size * world_size, -(-b // world_size) * world_size
            nearest = f"{above}" if below == 0 else f"{below} or {above}"
            raise DataError(
                f"global_batch_size {b} cannot be divided by {world_size} ranks: the nearest that can are {nearest}"
            )
        rank_batch = b // world_size
        micro_batch = _largest_part(rank_batch, self.device_batch_size)
        if _too_small(rank_batch, self.device_batch_size):
            fitting = [n for n in range(1, 2 * rank_batch) if not _too_small(n, self.device_batch_size)]
            below = max(n for n in fitting if n < rank_batch) * world_size
            above = min(n for n in fitting if n > rank_batch) * world_size
            larger = next(n for n in range(self.device_batch_size + 1, rank_batch + 1) if rank_batch % n == 0)
            raise DataError(
                f"global_batch_size {b} with device_batch_size {self.device_batch_size} would be "
                f"{rank_batch // micro_batch} micro-batches of {micro_batch}: take data.global_batch_size {below} or "
                f"{above}, or data.device_batch_size {larger}"
            )
        return Layout(rank_batch, micro_batch, rank_batch // micro_batch)

    def batches_per_step(self, world_size: int) -> int:
        """Batches that a rank gets for an optimiser step, which is what the Trainer accumulates."""
        return 1 if self.whole_batches else self.layout(world_size).accumulate

    def prepare_data(self) -> None:
        """Pack and index what is missing, on one rank of each node."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read the manifest and lay out the order."""
        if self._order is None:
            self._manifest = load_manifest(open_shards(self.train))
            self._check_skipped(self._manifest)
            self._order = Order(
                self._manifest.counts, seed=self.seed, global_batch_size=self.global_batch_size, lanes=self.lanes,
                window=self.window,
            )  # fmt: skip

    def _check_skipped(self, manifest: Manifest) -> None:
        """Too many images that could not be read when the set was packed are as bad as if they were met now."""
        self.num_skipped = len(skipped_images(manifest.root))
        total = self.num_skipped + manifest.num_samples
        if self.num_skipped > (max(1, self.bad_sample_budget * total) if self.bad_sample_budget else 0):
            raise DataError(
                f"{self.num_skipped:,} of {total:,} images of {self.train} could not be read when it was packed, more "
                f"than data.bad_sample_budget {self.bad_sample_budget:g} allows: repair or remove them, or allow more "
                f"({manifest.root / SKIPPED} names them)"
            )

    @property
    def manifest(self) -> Manifest:
        """What is in the training set; there after `setup`."""
        self.setup()
        assert self._manifest is not None
        return self._manifest

    @property
    def order(self) -> Order:
        """Which sample comes when; there after `setup`."""
        self.setup()
        assert self._order is not None
        return self._order

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return self.order.steps_per_epoch

    def train_dataloader(self) -> StepLoader:
        """Micro-batches from the Trainer's current step on; its length counts those of the whole run."""
        trainer = self.trainer
        assert trainer is not None
        batches = self.batches_per_step(trainer.world_size)
        if trainer.accumulate_grad_batches != batches:
            raise DataError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but global_batch_size "
                f"{self.global_batch_size} with device_batch_size {self.device_batch_size} on {trainer.world_size} "
                f"ranks needs {batches}: set it to that"
            )
        if trainer.max_steps < 1:
            raise DataError("the length of the run is unknown: set trainer.max_steps (optimiser steps)")
        _match_batch_count(trainer, trainer.global_step * batches)
        self.bad_samples = BadSamples(
            self.bad_samples_file, self.bad_sample_budget, self.manifest.num_samples, self.manifest.name,
            trainer.global_rank,
        )  # fmt: skip
        return StepLoader(
            self.stream(trainer.world_size, trainer.global_rank), start=trainer.global_step * batches,
            stop=trainer.max_steps * batches, workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda", bad_samples=self.bad_samples,
            on_failure=self.on_failure,
        )  # fmt: skip

    def stream(self, world_size: int = 1, rank: int = 0) -> TrainStream:
        """Micro-batches of one rank by number, without a Trainer."""
        shards_at_once = -(-self.order.lanes // world_size) * (self.window + 1)
        reader = ShardReader(self.manifest, max(64, shards_at_once), self.channels, self.bits)
        return TrainStream(
            self.order, reader, self.recipe, rank=rank, world_size=world_size,
            accumulate=self.batches_per_step(world_size), ahead=self._ahead(world_size, rank), tokenize=self.tokenize,
        )  # fmt: skip

    def _ahead(self, world_size: int, rank: int) -> TrainAhead | None:
        """What has remote shards fetched before they are needed."""
        if not self.manifest.url:
            return None
        share = self.global_batch_size // world_size
        ahead = TrainAhead(
            self.order, self.manifest, start=rank * share, stop=(rank + 1) * share, ranks=self._local_ranks,
            last_step=self.trainer.max_steps - 1 if self.trainer and self.trainer.max_steps > 0 else None,
        )  # fmt: skip
        if rank == 0:  # the others would say the same
            ahead.warn_of_little_space()
        return ahead

    @property
    def num_workers(self) -> int:
        """Loader processes of this rank: as given, or by its cores."""
        if self.workers is not None:
            return self.workers
        on_accelerator = self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"
        return default_workers(self._local_ranks, on_accelerator=on_accelerator)

    @property
    def _local_ranks(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.trainer.num_devices if self.trainer else 1))

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Change colours where the recipe left that to the device, and normalise, in the model's own precision."""
        dtype = getattr(self.trainer and self.trainer.lightning_module, "dtype", torch.float32)
        for name in self.recipe.views:
            views, colors = batch[name], batch.pop(f"{name}_color", None)
            if colors is not None:
                changed = change_colors(views.flatten(0, -4), colors.reshape(-1, colors.shape[-1]))
                views = changed.view(views.shape)
            batch[name] = normalize(views, self.mean, self.std, dtype)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on, and how far it was trained on."""
        step = self.trainer.global_step if self.trainer else 0
        about = {"train": self.train, "samples": self.manifest.num_samples, "unnamed": self.manifest.unnamed_hash}
        return {"step": step, **about, **self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with another order than the checkpoint's. DataError names what differs."""
        now = self._settings()
        differ = [name for name in now if state_dict.get(name) != now[name] and not self._may_change(name)]
        if "manifest" in differ and self._same_images(state_dict):
            differ.remove("manifest")
        if differ:
            changes = [f"data.{n} was {state_dict.get(n)}, now it is {now[n]}" for n in differ if n != "manifest"]
            if "manifest" in differ:
                changes.insert(0, self._other_data(state_dict.get("train"), state_dict.get("samples")))
            options = ",".join(_option(name) for name in differ)
            raise DataError(
                f"{'; '.join(changes)}. Begin a new run in another --output, go back to what it was, or go on with "
                f"what is new by --allow_changes '[{options}]'"
            )

    def _may_change(self, name: str) -> bool:
        follows = name == "lanes" and self.lanes is None and "data.global_batch_size" in self.allow_changes
        return follows or "data" in self.allow_changes or _option(name) in self.allow_changes

    def _same_images(self, state_dict: dict[str, Any]) -> bool:
        """Whether at most names of classes are others, and no caption is made of them.

        A set may have got its names later, and one behind a URL may have none.
        """
        captions = self.recipe.captions
        named = captions is not None and bool(captions.templates)
        then = (state_dict.get("manifest"), state_dict.get("unnamed"))  # the latter is newer than some checkpoints
        return not named and self.manifest.unnamed_hash in then

    def _other_data(self, train: str | None, samples: int | None) -> str:
        now = f"{self.manifest.num_samples:,} images"
        if train is None:
            return f"other data: this run was trained on another set than {self.train} ({now})"
        if train == self.train:
            return f"other data: {train} has changed since this run was trained on it ({samples:,} images, now {now})"
        return f"other data: this run was trained on {train} ({samples:,} images), now it is {self.train} ({now})"

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "manifest": self.manifest.hash, "global_batch_size": self.global_batch_size,
            "lanes": self.order.lanes, "window": self.window,
        }  # fmt: skip


def _option(setting: str) -> str:
    """The key of the config behind a setting that the order depends on."""
    return "data.train" if setting == "manifest" else f"data.{setting}"


def _largest_part(batch: int, most: int) -> int:
    """Samples of a micro-batch: the largest divisor of the batch that is at most `most`."""
    return next(batch // n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most)


def _too_small(batch: int, most: int) -> bool:
    """Whether micro-batches of this batch would leave more than half of a device unused."""
    return batch > most and 2 * _largest_part(batch, most) < most


def _match_batch_count(trainer: Trainer, micro_steps: int) -> None:
    """Let a resumed Trainer count micro-batches as if the run had always had its present accumulation.

    A checkpoint holds the number of micro-batches, which decides where optimiser steps and the run end; on another
    number of ranks the same step is another number of them.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    shift = micro_steps - progress.current.ready
    counted: Any
    for counted in (progress.current, progress.total):
        counted.ready += shift
        counted.started += shift
        counted.processed += shift
        counted.completed += shift
