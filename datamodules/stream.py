"""The training stream: micro-batch number `m` of a rank, made from nothing but `m` and the settings.

Order, reading, decoding, replacement of bad samples and augmentation all happen in whichever worker is asked for `m`.

Axes: b = images of a micro-batch, h, w = rows and columns.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules import rng
from datamodules.bad_samples import BadSample, BadSamples
from datamodules.errors import DataError
from datamodules.loader import iterate
from datamodules.order import Draws, Order
from datamodules.recipes import Recipe
from datamodules.sample_captions import SampleCaptions
from datamodules.shard_reader import BadSampleError, ShardReader

_MOST_TRIES = 32
_CAPTION = 7  # what a random number is for; continues the list in recipes.py


class TrainStream(Dataset[dict[str, Any]]):
    """Batches by number: `stream[m]` is micro-batch `m % accumulate` of optimiser step `m // accumulate`.

    A batch is {"image": uint8 [b 3 h w] (or whatever views the recipe makes), "rng": int64 [b], "position": int64 [b],
    "key": list of "SHARD/KEY", "epoch": int, "step": int, "bad": list of BadSample}; with captions also "caption": list
    of texts, and "text": int64 [b t], its tokens.

    Args:
        order: of the whole run.
        reader: of the same shards.
        recipe: images to views.
        rank, world_size: takes slice [rank B / world_size, (rank + 1) B / world_size) of every global batch B.
        accumulate: micro-batches that this slice is cut into.
        ahead: called with every step that is loaded, to have later ones prepared.
        tokenize: texts to tokens int64 [b t]; needed by recipes with captions only.
    """

    def __init__(
        self, order: Order, reader: ShardReader, recipe: Recipe, *,
        rank: int = 0, world_size: int = 1, accumulate: int = 1, ahead: Callable[[int], None] | None = None,
        tokenize: Callable[[list[str]], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.order, self.reader, self.recipe, self.ahead, self.tokenize = order, reader, recipe, ahead, tokenize
        self._captions = None if recipe.captions is None else SampleCaptions(reader, recipe.captions)
        self.accumulate = accumulate
        self.micro_batch, rest = divmod(order.global_batch_size, world_size * accumulate)
        if rest:
            raise DataError(
                f"global_batch_size {order.global_batch_size} cannot be divided by {world_size} ranks "
                f"times {accumulate} micro-batches"
            )
        self._first = rank * accumulate * self.micro_batch

    def __getitem__(self, micro_step: int) -> dict[str, Any]:
        if self.ahead is not None:
            self.ahead(micro_step // self.accumulate)
        draws = self._draws(micro_step)
        keys: list[str] = []
        captions: list[str] = []
        bad: list[BadSample] = []
        views = self.recipe(self._images(draws, keys, captions, bad), draws.rng)
        return self._batch(micro_step, draws, views, keys, captions, bad)

    def blank(self, micro_step: int) -> dict[str, Any]:
        """A batch of the same shape that needs no data, for a step that will not count."""
        draws = self._draws(micro_step)
        dtype = torch.uint8 if self.reader.bits == 8 else torch.float32
        black = (torch.zeros((self.reader.channels, 1, 1), dtype=dtype) for _ in range(self.micro_batch))
        names = [""] * self.micro_batch
        return self._batch(micro_step, draws, self.recipe(black, draws.rng), names, names, [])

    def _draws(self, micro_step: int) -> Draws:
        step, micro = divmod(micro_step, self.accumulate)
        start = self._first + micro * self.micro_batch
        return self.order.batch(step, start, start + self.micro_batch)

    def _batch(
        self, micro_step: int, draws: Draws, views: dict[str, Any], keys: list[str], captions: list[str],
        bad: list[BadSample],
    ) -> dict[str, Any]:  # fmt: skip
        texts: dict[str, Any] = {} if self._captions is None else {"caption": captions}
        if texts and self.tokenize is not None:
            texts["text"] = self.tokenize(captions)
        return {
            **views,
            **texts,
            "rng": torch.from_numpy(draws.rng),
            "position": torch.from_numpy(draws.position),
            "key": keys,
            "epoch": draws.epoch,
            "step": micro_step // self.accumulate,
            "bad": bad,
        }

    def _images(self, draws: Draws, keys: list[str], captions: list[str], bad: list[BadSample]) -> Iterator[Tensor]:
        chances = rng.uniform(draws.rng, _CAPTION, 1)[:, 0]
        places = zip(*(each.tolist() for each in (draws.shard, draws.sample, draws.position, chances)), strict=True)
        for shard, sample, position, chance in places:
            for attempt in range(_MOST_TRIES):
                try:
                    texts = [] if self._captions is None else self._captions.all(shard, sample)
                    key, image = self.reader.image(shard, sample)
                    break
                except BadSampleError as error:
                    bad.append(BadSample(error.shard, error.key, error.reason, draws.epoch))
                    shard, sample = self.order.replacement(draws.epoch, position, attempt)
            else:
                raise DataError(
                    f"none of {_MOST_TRIES} samples tried in {self.reader.manifest.name} could be read, the last one: "
                    f"{bad[-1].shard}, {bad[-1].key}: {bad[-1].reason}"
                )
            keys.append(f"{self.reader.name(shard)}/{key}")
            if texts:
                captions.append(texts[int(chance * len(texts))])
            yield image


class StepLoader:
    """What a Trainer iterates over: the micro-batches [start, stop) of a stream, with bad samples taken into account.

    Its length is `stop`, not what is left: a resumed Trainer goes on counting batches where it was, and compares that
    with the length.

    Args:
        stream: of this rank.
        start, stop: micro-batches of this rank since the start of the run.
        workers: processes; 0 loads in this one.
        pin_memory: put the batches where an accelerator can fetch them.
        bad_samples: the account.
        on_failure: told of a DataError before it is raised. Other ranks are on their way into the same optimiser step
            then; blank batches lead this one to the step's end, where all can agree to stop.
    """

    def __init__(
        self, stream: TrainStream, *, start: int, stop: int, workers: int, pin_memory: bool, bad_samples: BadSamples,
        on_failure: Callable[[DataError], None] | None = None,
    ) -> None:  # fmt: skip
        self.stream, self.start, self.stop = stream, start, stop
        self.workers, self.pin_memory, self.bad_samples = workers, pin_memory, bad_samples
        self.on_failure = on_failure

    def __len__(self) -> int:
        return self.stop

    def state_dict(self) -> dict[str, Any]:
        """Nothing: that this exists tells Lightning that resuming works; the state is in the LightningDataModule."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        at = self.start
        try:
            steps = range(at, self.stop)
            for batch in iterate(self.stream, steps, workers=self.workers, pin_memory=self.pin_memory):
                self.bad_samples.add(batch.pop("bad"), drawn=(batch["step"] + 1) * self.stream.order.global_batch_size)
                yield batch
                at += 1
        except DataError as error:
            if self.on_failure is not None:
                self.on_failure(error)
                end_of_step = (at // self.stream.accumulate + 1) * self.stream.accumulate
                yield from map(self.stream.blank, range(at, end_of_step))
            raise
