"""Memory for batches that loader workers borrow, and may use again when nobody in the main process holds the batch.

torch makes a new file of shared memory for each tensor that a worker sends. The system clears its pages one by one,
which takes a worker as long as a third of its crops, and they lie in /dev/shm, which is small in many containers. Here
a loader has one unnamed file that its workers inherit; they write batches into a few slots of it in turns.
"""

import mmap
import os
import weakref
from itertools import count
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

_SLOTS = 16  # of a worker: it prepares two batches of up to two tensors, others are in use or about to be
_SLOT_BYTES = 1 << 36  # the file has holes: what is not written takes no memory
_FREE, _TAKEN = 0, 1

_ids = count()
_lenders: dict[int, "Lender"] = {}  # where what arrives finds its memory


class Lender:
    """The memory of one loader, made before its workers are forked.

    Args:
        workers: how many will borrow.

    Raises:
        OSError: the system has no such files.
    """

    def __init__(self, workers: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("no unnamed files in memory here")
        slots = workers * _SLOTS
        self.id = next(_ids)
        self.states = mmap.mmap(-1, slots)  # a byte for each slot; set by its worker, cleared in the main process
        self.file = os.memfd_create("trivit-batches")
        self._maps: dict[int, mmap.mmap] = {}
        try:
            os.ftruncate(self.file, slots * _SLOT_BYTES)
        except OSError:
            os.close(self.file)
            raise
        _lenders[self.id] = self

    def close(self) -> None:
        """Borrow no more; batches that are still held stay what they are."""
        del _lenders[self.id]
        os.close(self.file)

    def whole(self, slot: int, capacity: int) -> Tensor:
        """A slot, uint8 [capacity]; when nobody holds this tensor or a view of it any more, it is free again."""
        if slot not in self._maps or len(self._maps[slot]) < capacity:
            self._maps[slot] = mmap.mmap(self.file, capacity, offset=slot * _SLOT_BYTES)
        array = np.frombuffer(self._maps[slot], np.uint8)
        # torch holds the array for as long as it needs the memory, also for autograd.
        weakref.finalize(array, self.states.__setitem__, slot, _FREE).atexit = False
        return torch.from_numpy(array)


class Borrower:
    """A worker's side of it.

    Args:
        lender: inherited.
        worker: its number.
    """

    here: ClassVar["Borrower | None"] = None
    """That of this process, if it is a worker."""

    def __init__(self, lender: Lender, worker: int) -> None:
        self.lender = lender
        self._slots = range(worker * _SLOTS, (worker + 1) * _SLOTS)
        self._maps: dict[int, mmap.mmap] = {}
        self._unsent: dict[int, int] = {}  # address -> slot

    def borrow(self, size: int) -> Tensor | None:
        """Uninitialised uint8 memory of at least `size` bytes, or None when all is in use."""
        free = {slot: self._room(slot) for slot in self._slots if self.lender.states[slot] == _FREE}
        if not free or not 0 < size <= _SLOT_BYTES:
            return None
        fitting = [slot for slot, room in free.items() if room >= size]
        # The smallest that is large enough, else a new one, else any: it grows.
        slot = min(fitting or free, key=lambda slot: free[slot])
        if not fitting:
            capacity = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            self._maps[slot] = mmap.mmap(self.lender.file, capacity, offset=slot * _SLOT_BYTES)
        self.lender.states[slot] = _TAKEN
        memory = torch.frombuffer(self._maps[slot], dtype=torch.uint8)
        self._unsent[memory.data_ptr()] = slot
        return memory

    def _room(self, slot: int) -> int:
        return len(self._maps[slot]) if slot in self._maps else 0

    def sent(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Those of the tensors that lie in borrowed memory, as what is to be sent; what else was borrowed is free."""
        lent = {}
        slots = set()
        for name, tensor in tensors.items():
            slot = self._unsent.get(tensor.untyped_storage().data_ptr())
            if slot is not None and slot not in slots:
                slots.add(slot)
                geometry = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
                lent[name] = _Lent(self.lender.id, slot, len(self._maps[slot]), tensor.dtype, *geometry)
        for slot in set(self._unsent.values()) - slots:
            self.lender.states[slot] = _FREE
        self._unsent.clear()
        return lent


class _Lent(NamedTuple):
    """A tensor on its way to the main process, where it arrives as a tensor."""

    lender: int
    slot: int
    capacity: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, tuple(self)


def _arrive(lender: int, slot: int, capacity: int, dtype: torch.dtype, *geometry: Any) -> Tensor:
    return _lenders[lender].whole(slot, capacity).view(dtype).as_strided(*geometry)
