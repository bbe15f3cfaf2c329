import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from datamodules import lent_memory
from datamodules.batches import empty_images
from datamodules.errors import DataError
from datamodules.loader import iterate


class Images(Dataset):
    """Images full of their index, in two sizes, and where the worker wrote them."""

    def __init__(self, dtype=torch.uint8, fail_at=None):
        self.dtype, self.fail_at = dtype, fail_at

    def __getitem__(self, index):
        images = empty_images(2, 3, 40, 50, self.dtype).fill_(index)
        crops = empty_images(2, 3, 8, 8, self.dtype).fill_(index + 100)
        if index == self.fail_at:
            raise DataError("no more")
        return {"image": images, "crop": crops, "places": (images.data_ptr(), crops.data_ptr()), "index": index}


def check(batch, index):
    assert batch["index"] == index
    assert batch["image"].shape == (2, 3, 40, 50) and batch["crop"].shape == (2, 3, 8, 8)
    assert (batch["image"] == index).all() and (batch["crop"] == index + 100).all()
    assert batch["image"].permute(0, 2, 3, 1).is_contiguous(), "channels are innermost"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_that_nobody_holds_gives_its_memory_back(dtype, workers):
    places = set()
    for i, batch in enumerate(iterate(Images(dtype), range(40), workers=workers)):
        check(batch, i)
        places |= {(i % workers, place) for place in batch["places"]}
    # Two tensors of each worker's batch; a few are prepared ahead and one is in use.
    assert 2 * workers <= len(places) <= 2 * 4 * workers


def test_what_is_held_is_not_written_to():
    kept = []
    for i, batch in enumerate(iterate(Images(torch.float32), range(60), workers=1)):
        if i % 4 == 0:
            weight = torch.ones((), requires_grad=True)
            loss = (batch["image"] * weight).sum()  # holds the batch for its gradient, out of Python's sight
            kept.append((i, batch["image"][1, :, 3:9], batch["crop"].numpy()[0], loss, weight))
    # More than there are slots for: later batches travelled in memory of their own.
    assert len(kept) * 2 > lent_memory._SLOTS / 2
    for i, view, array, loss, weight in kept:
        assert (view == i).all() and (array == i + 100).all()
        loss.backward()
        assert weight.grad == i * 2 * 3 * 40 * 50


def test_all_batches_may_be_kept_and_outlive_the_loader():
    batches = list(iterate(Images(), range(50), workers=2))
    for i, batch in enumerate(batches):
        check(batch, i)
    assert not lent_memory._lenders


def test_a_failure_does_not_lose_memory():
    class Unsteady(Images):
        def __getitem__(self, index):
            borrower = lent_memory.Borrower.here
            if index < 30:
                try:
                    return super().__getitem__(index)
                finally:
                    borrower.sent({})  # as after a DataError
            return sum(borrower.lender.states[slot] for slot in borrower._slots)

    assert list(iterate(Unsteady(), range(31), workers=1))[30] == 0
    with pytest.raises(DataError, match="no more"):
        list(iterate(Images(fail_at=7), range(9), workers=1))


def without_memfd(name):
    raise OSError("not here")


@pytest.mark.parametrize("missing", ["call", "attribute"])
def test_without_such_files_batches_travel_as_torch_sends_them(monkeypatch, missing):
    if missing == "call":
        monkeypatch.setattr(os, "memfd_create", without_memfd)
    else:
        monkeypatch.delattr(os, "memfd_create")
    for i, batch in enumerate(iterate(Images(), range(5), workers=1)):
        check(batch, i)
        assert batch["image"].is_shared()


def test_batches_that_grow_find_memory():
    class Sizes(Dataset):
        def __getitem__(self, index):
            assert get_worker_info() is not None
            images = empty_images(1 + index // 8, 3, 64, 64).fill_(index)
            return {"image": images, "borrowed": not images.is_shared()}

    for i, batch in enumerate(iterate(Sizes(), range(200), workers=1)):
        assert batch["image"].shape == (1 + i // 8, 3, 64, 64) and (batch["image"] == i).all()
        assert batch["borrowed"], "also when all slots have been used for smaller ones"


def test_two_names_for_one_tensor():
    class Twice(Dataset):
        def __getitem__(self, index):
            images = empty_images(2, 3, 40, 50).fill_(index)
            return {"image": images, "again": images, "part": images[1]}

    for i, batch in enumerate(iterate(Twice(), range(9), workers=1)):
        assert all((batch[name] == i).all() for name in ("image", "again", "part"))


def test_open_files_do_not_add_up():
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        for batch in iterate(Images(), range(8), workers=2):
            del batch
    after = len(list(Path("/proc/self/fd").iterdir()))
    assert after <= before + 2, "torch itself may keep one or two"


def test_no_workers_no_borrowing():
    (batch,) = iterate(Images(), range(1), workers=0)
    check(batch, 0)
    assert not batch["image"].is_shared() and lent_memory.Borrower.here is None


def test_capacity_is_whole_pages():
    lender = lent_memory.Lender(1)
    borrower = lent_memory.Borrower(lender, 0)
    memory = borrower.borrow(10)
    assert memory is not None and memory.nbytes == mmap.PAGESIZE and memory.dtype == torch.uint8
    memory.numpy()[:3] = np.arange(3)
    (sent,) = borrower.sent({"a": memory}).values()
    arrived = lender.whole(sent.slot, sent.capacity)
    assert arrived[:3].tolist() == [0, 1, 2] and lender.states[sent.slot] == 1
    del arrived
    assert lender.states[sent.slot] == 0
    lender.close()
