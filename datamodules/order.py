"""Which sample comes at which place of a run: a pure function of (seed, epoch, position).

An epoch first sets aside the samples that do not fill a batch: a range of the data set that moves on by its own
length each epoch, so that every sample is left out equally often. The remaining samples of the shards, in an order of
shards drawn for the epoch, lie end to end; this *layout* is cut into L equal *lanes*, and a lane is shuffled inside
*windows* of K consecutive shards. A global batch takes B/L consecutive places from every lane, lane after lane, so
that a rank which takes a contiguous slice of the batch stays within its own lanes, hence its own shards.

Nothing is stored per sample: a window is shuffled by a keyed permutation that is computed place by place.

Axes: b = samples asked for, B = global batch, L = lanes, K = shards in a window.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from datamodules import rng
from datamodules.errors import DataError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

MOST_LANES = 64
_ROUNDS = 4
_TRIES_IN_WINDOW, _TRIES_IN_LANE = 8, 16


class Draws(NamedTuple):
    """Where to read a (part of a) global batch; `position` counts within the epoch, `rng` are 63-bit keys."""

    epoch: int
    shard: Ints  # [b]
    sample: Ints  # [b] index within the shard
    position: Ints  # [b]
    rng: Ints  # [b]


class Window(NamedTuple):
    """Some consecutive shards of a lane that are shuffled together; `number` counts the windows of all lanes."""

    epoch: int
    lane: int
    number: int


@dataclass(frozen=True)
class _Epoch:
    """The tables of one epoch; a piece is a run of samples of one shard, starts are places in the layout."""

    piece_start: Ints
    piece_shard: Ints
    piece_first: Ints
    window_start: Ints
    window_size: Ints
    window_grid: tuple[Words, Words]
    window_key: Words


class Order:
    """The order of samples of a whole run.

    Args:
        counts: samples in each shard [shards].
        seed: any integer.
        global_batch_size: B, samples of one optimiser step over all ranks.
        lanes: L, a divisor of B; None takes the largest one up to 64.
        window: K, how many shards of a lane are shuffled together.

    Raises:
        DataError: when no order is possible with these numbers.
    """

    def __init__(
        self, counts: ArrayLike, *, seed: int, global_batch_size: int, lanes: int | None = None, window: int = 4
    ) -> None:
        self.counts: Ints = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        if self.num_samples == 0:
            raise DataError("the data set has no samples")
        if not 1 <= global_batch_size <= self.num_samples:
            raise DataError(
                f"global_batch_size {global_batch_size} must be between 1 and the number of samples, {self.num_samples}"
            )
        default = default_lanes(global_batch_size)
        self.lanes = default if lanes is None else lanes
        if self.lanes < 1 or global_batch_size % self.lanes:
            raise DataError(
                f"lanes {lanes} must divide global_batch_size {global_batch_size}; leave it out or take {default}"
            )
        if window < 1:
            raise DataError(f"window {window} must be at least 1 shard")
        self.seed, self.window, self.global_batch_size = seed, window, global_batch_size
        self.steps_per_epoch = self.num_samples // global_batch_size
        self._used = self.steps_per_epoch * global_batch_size
        self._lane_size = self._used // self.lanes
        lane, in_lane = np.divmod(np.arange(global_batch_size, dtype=np.int64), global_batch_size // self.lanes)
        self._first_places: Ints = lane * self._lane_size + in_lane  # of an epoch's first batch
        self._first_sample: Ints = np.concatenate([[0], np.cumsum(self.counts)])
        self._epochs: dict[int, _Epoch] = {}

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Draws:
        """Places [start, stop) of the global batch of optimiser step `step` (counted from the start of the run)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        stop = self.global_batch_size if stop is None else stop
        place = self._first_places[start:stop] + step_in_epoch * (self.global_batch_size // self.lanes)
        position = np.arange(start, stop, dtype=np.int64) + step_in_epoch * self.global_batch_size
        shard, sample = self._look_up(epoch, self._shuffled(epoch, place))
        return Draws(epoch, shard, sample, position, rng.sample_keys(self.seed, epoch, position))

    def replacement(self, epoch: int, position: int, attempt: int) -> tuple[int, int]:
        """Give the (shard, sample) to try instead of an unreadable one: from its window, then its lane, then any."""
        step_in_epoch, in_batch = divmod(position, self.global_batch_size)
        per_lane = self.global_batch_size // self.lanes
        lane, in_lane = divmod(in_batch, per_lane)
        place = lane * self._lane_size + step_in_epoch * per_lane + in_lane
        if attempt < _TRIES_IN_WINDOW:
            table = self._epoch(epoch)
            window = int(np.searchsorted(table.window_start, place, side="right")) - 1
            start, size = int(table.window_start[window]), int(table.window_size[window])
        elif attempt < _TRIES_IN_WINDOW + _TRIES_IN_LANE:
            start, size = lane * self._lane_size, self._lane_size
        else:
            start, size = 0, self._used
        chosen = start + rng.word(self.seed, epoch, 2, position, attempt) % size
        shard, sample = self._look_up(epoch, np.array([chosen]))
        return int(shard[0]), int(sample[0])

    def windows(self, step: int, start: int = 0, stop: int | None = None) -> list[Window]:
        """The windows that places [start, stop) of the global batch of a step are drawn from, lane after lane."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        per_lane = self.global_batch_size // self.lanes
        lanes = range(start // per_lane, -(-(self.global_batch_size if stop is None else stop) // per_lane))
        place = np.arange(lanes.start, lanes.stop) * self._lane_size + step_in_epoch * per_lane
        starts = self._epoch(epoch).window_start
        first = np.searchsorted(starts, place, side="right") - 1
        end = np.searchsorted(starts, place + per_lane)
        in_lanes = zip(lanes, first.tolist(), end.tolist(), strict=True)
        return [Window(epoch, lane, number) for lane, one, other in in_lanes for number in range(one, other)]

    def following(self, window: Window) -> Window:
        """The window after this one in its lane, which goes on in the next epoch."""
        epoch, lane, number = window
        starts = self._epoch(epoch).window_start
        if number + 1 < len(starts) and starts[number + 1] < (lane + 1) * self._lane_size:
            return Window(epoch, lane, number + 1)
        starts = self._epoch(epoch + 1).window_start
        return Window(epoch + 1, lane, int(np.searchsorted(starts, lane * self._lane_size)))

    def shards_in(self, window: Window) -> list[int]:
        """The shards that samples of this window lie in."""
        table = self._epoch(window.epoch)
        start = table.window_start[window.number]
        first = np.searchsorted(table.piece_start, start, side="right") - 1
        last = np.searchsorted(table.piece_start, start + table.window_size[window.number])
        return list(dict.fromkeys(table.piece_shard[first:last].tolist()))

    def _shuffled(self, epoch: int, place: Ints) -> Ints:
        table = self._epoch(epoch)
        window = np.searchsorted(table.window_start, place, side="right") - 1
        start, (rows, columns) = table.window_start[window], table.window_grid
        grid = rows[window], columns[window]
        return start + permute(place - start, table.window_size[window], table.window_key[window], grid)

    def _look_up(self, epoch: int, place: Ints) -> tuple[Ints, Ints]:
        table = self._epoch(epoch)
        piece = np.searchsorted(table.piece_start, place, side="right") - 1
        shard = table.piece_shard[piece]
        return shard, table.piece_first[piece] + (place - table.piece_start[piece])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            # An epoch's first and last steps may be asked for in turn (prefetching), older ones never again.
            self._epochs = {e: t for e, t in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = self._lay_out(epoch)
        return self._epochs[epoch]

    def _lay_out(self, epoch: int) -> _Epoch:
        shard, first, size = self._pieces(epoch)
        shuffled = np.argsort(rng.words(rng.word(self.seed, epoch, 3), np.arange(len(self.counts))), kind="stable")
        rank = np.empty_like(shuffled)
        rank[shuffled] = np.arange(len(shuffled))
        turn = np.argsort(rank[shard], kind="stable")
        shard, first, size = shard[turn], first[turn], size[turn]
        # Begin somewhere inside the first shard, or a data set of few shards would have the same lanes every epoch.
        begin = rng.word(self.seed, epoch, 4) % int(size[shard == shard[0]].sum())
        piece = int(np.searchsorted(np.cumsum(size), begin, side="right"))
        cut = begin - int(size[:piece].sum())
        shard, first, size = (np.append(np.roll(column, -piece), column[piece]) for column in (shard, first, size))
        first[0] += cut
        size[0] -= cut
        size[-1] = cut
        shard, first, size = shard[size > 0], first[size > 0], size[size > 0]
        piece_start = np.cumsum(size) - size

        lane_start = np.arange(self.lanes, dtype=np.int64) * self._lane_size
        starts = np.unique(np.concatenate([piece_start, lane_start]))
        in_lane = np.arange(len(starts)) - np.searchsorted(starts, lane_start)[starts // self._lane_size]
        window_start = starts[in_lane % self.window == 0]
        window_size = np.diff(np.append(window_start, self._used))
        window_key = rng.words(rng.word(self.seed, epoch, 5), window_start)
        return _Epoch(piece_start, shard, first, window_start, window_size, _grid(window_size), window_key)

    def _pieces(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """Shard, first sample and size of every run of samples of the epoch, in the order of the data set."""
        left_out = self.num_samples - self._used
        begin = (rng.word(self.seed, 6) + epoch * left_out) % self.num_samples
        # The range may go round the end of the data set; its two ends and the shards' are where runs can end.
        ends = [begin, (begin + left_out) % self.num_samples] if left_out else []
        cuts = np.unique(np.concatenate([self._first_sample, np.array(ends, dtype=np.int64)]))
        start, stop = cuts[:-1], cuts[1:]
        kept = (start - begin) % self.num_samples >= left_out
        start, stop = start[kept], stop[kept]
        shard = np.searchsorted(self._first_sample, start, side="right") - 1
        return shard, start - self._first_sample[shard], stop - start


def default_lanes(global_batch_size: int) -> int:
    """Largest divisor of the global batch size up to 64."""
    return max(lanes for lanes in range(1, MOST_LANES + 1) if global_batch_size % lanes == 0)


def permute(index: Ints, size: Ints, key: Words, grid: tuple[Words, Words] | None = None) -> Ints:
    """Send each index in [0, size) to its place in the permutation of that size and key; elementwise, [b] each -> [b].

    A Feistel network over a grid of about sqrt(size) rows and columns; the few places of the grid that are not in
    [0, size) are walked through until one is (Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9, cycle walking).
    """
    sizes = size.astype(np.uint64)
    rows, columns = _grid(size) if grid is None else grid  # may be at hand, and roots and divisions take time
    out = _feistel(index.astype(np.uint64), rows, columns, key)
    walking = np.flatnonzero(out >= sizes)
    while len(walking):
        out[walking] = _feistel(out[walking], rows[walking], columns[walking], key[walking])
        walking = walking[out[walking] >= sizes[walking]]
    return out.astype(np.int64)


def _grid(size: Ints) -> tuple[Words, Words]:
    """Rows and columns of a nearly square grid of at least `size` places."""
    sizes = size.astype(np.uint64)
    rows: Words = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    return rows, (sizes + rows - np.uint64(1)) // rows


def _feistel(x: Words, rows: Words, columns: Words, key: Words) -> Words:
    modulus, half = (rows, columns), list(np.divmod(x, columns))
    for turn in range(_ROUNDS):
        a, b = turn % 2, 1 - turn % 2
        noise = rng.mix(half[b] ^ (key + np.uint64(turn)))
        noise >>= np.uint64(32)
        # noise * modulus / 2^32 is a number below the modulus without a division, which would take most of the time.
        noise *= modulus[a]
        noise >>= np.uint64(32)
        noise += half[a]
        half[a] = np.minimum(noise, noise - modulus[a])  # below zero words wrap round to huge ones
    grid: Words = half[0] * columns + half[1]
    return grid
