"""Running a map-style dataset of whole batches in worker processes that neither outlive, hang nor interrupt the run."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.errors import DataError, DataFailure
from datamodules.lent_memory import Borrower, Lender
from datamodules.workers import available_cores

_MOST_WORKERS = 16
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_SMALL_BYTES = 1 << 14


class Failure(NamedTuple):
    """Sent by a worker in place of a batch: torch would raise its DataError anew with a traceback for a message."""

    message: str
    kind: type[DataError] = DataError


class GuardedDataset(Dataset[Any]):
    """Gives a `Failure` where the dataset raises a DataError.

    Args:
        dataset: of whole batches.
        sent: batches are on their way from a worker to the main process.
    """

    def __init__(self, dataset: Dataset[Any], sent: bool) -> None:
        self.dataset, self.sent = dataset, sent

    def __getitem__(self, index: int) -> Any:
        failure: Failure | None = None
        try:
            batch = self.dataset[index]
        except DataError as error:
            batch, failure = {}, Failure(str(error), type(error))
        if self.sent and isinstance(batch, dict):
            batch = _to_send(batch)
        return failure or batch


class _Value(NamedTuple):
    """A small tensor on its way to the main process."""

    array: NDArray[Any]


def _to_send(batch: dict[str, Any]) -> dict[str, Any]:
    """A worker's batch with tensors in borrowed memory as their places, and small ones as arrays.

    Everything else torch puts into shared memory of its own, with a file and a socket for each tensor.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    lent = Borrower.here.sent(tensors) if Borrower.here is not None else {}
    small = {k: v for k, v in tensors.items() if v.nbytes <= _SMALL_BYTES and not v.is_shared()}  # type: ignore[no-untyped-call]
    return batch | {name: _Value(tensor.numpy()) for name, tensor in small.items()} | lent


def _received(batch: Any) -> Any:
    """The same batch as tensors."""
    if not isinstance(batch, dict):
        return batch
    return {k: torch.from_numpy(v.array) if isinstance(v, _Value) else v for k, v in batch.items()}


def iterate(dataset: Dataset[Any], indices: Sequence[int], *, workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """Yield `dataset[i]` for each of the indices, in this order, prepared ahead by worker processes.

    Workers are forked (where the system can), because an unguarded user script must not run again in each of them; what
    they execute uses a single thread and no lock that another thread of the parent may have held.

    Raises:
        DataError: one that a worker met; DataFailure when a worker was killed.
    """
    forked = workers if sys.platform == "linux" else 0
    with _lender(forked) as lender:
        yield from _batches(dataset, indices, workers, pin_memory, lender, "fork" if forked else None)


def _batches(
    dataset: Dataset[Any], indices: Sequence[int], workers: int, pin_memory: bool, lender: Lender | None,
    context: str | None,
) -> Iterator[Any]:  # fmt: skip
    # The system ends a child when the thread that forked it ends; only the main thread lives as long as its process.
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
    with _interrupt_held_back(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader = DataLoader(
            GuardedDataset(dataset, sent=workers > 0),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=partial(_settle_worker, lender=lender, parent=parent) if workers else None,
            multiprocessing_context=context,
            generator=torch.Generator(),  # or torch would draw from the global one, and what comes later would differ
        )
        with _no_exceptions_out_of_nowhere():
            batches: Any = iter(loader)
    over = threading.Event()
    if workers:
        threading.Thread(target=_end_all_when_one_dies, args=(batches, over), daemon=True).start()
    try:
        for batch in batches:
            if isinstance(batch, Failure):
                raise batch.kind(batch.message)
            yield _received(batch)
    except (RuntimeError, OSError, EOFError) as error:
        told = "DataLoader worker" in str(error)  # torch says it itself, or a pipe breaks before torch knows
        if not workers or not (told or _any_was_killed(batches._workers)):
            raise
        raise DataFailure(
            "a loader worker was killed: usually memory or shared memory (/dev/shm) ran out; use fewer data.workers "
            "or a smaller data.device_batch_size"
        ) from error
    finally:
        over.set()
        if workers:
            batches._shutdown_workers()


@contextlib.contextmanager
def _lender(forked: int) -> Iterator[Lender | None]:
    """Memory for what forked workers send; None where there are none or the system has no such memory."""
    lender = None
    if forked:
        with contextlib.suppress(OSError):
            lender = Lender(forked)
    try:
        yield lender
    finally:
        if lender is not None:
            lender.close()


def _end_all_when_one_dies(batches: Any, over: threading.Event) -> None:
    """Wake the main process, which may be waiting for the rest of a message of a worker that was killed.

    It would wait for ever, because the other workers and itself can write to the same pipe: its end is seen when none
    of them can.
    """
    workers = list(batches._workers)
    sentinels = [worker.sentinel for worker in workers]
    while not over.is_set():
        if wait(sentinels, timeout=0.5) and not over.is_set():
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, batches._worker_result_queue._writer.fileno())
            os.close(nowhere)
            return


def _any_was_killed(workers: list[Any]) -> bool:
    """Whether that is why the exception came; it has many faces, and may be faster than the news of the death."""
    for worker in workers:
        worker.join(0.2)
    return any(worker.exitcode not in (None, 0) for worker in workers)


def default_workers(local_ranks: int = 1, *, on_accelerator: bool) -> int:
    """How many workers a rank gets unless it says: a core each but one, or a few when the CPU itself trains."""
    cores = available_cores(local_ranks)
    return max(1, min(_MOST_WORKERS, cores - 1 if on_accelerator else cores // 4))


def check_workers(workers: int | None) -> None:
    """Refuse a negative number. DataError."""
    if workers is not None and workers < 0:
        raise DataError(f"workers {workers} must be 0 (load in the main process) or more")


def _as_it_is(batch: Any) -> Any:
    return batch


def _settle_worker(worker: int, lender: Lender | None, parent: int | None) -> None:
    """Leave signals to the main process: it decides when a run ends, and needs its batches until then."""
    if parent is not None and sys.platform == "linux":
        # A worker in the middle of a message would not notice that nobody reads it any more.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)
    Borrower.here = None if lender is None else Borrower(lender, worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # SLURM sends TERM to every process of a job. From anyone but the parent it is not for us.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (parent, 0):
        pass
    os._exit(0)


@contextlib.contextmanager
def _no_exceptions_out_of_nowhere() -> Iterator[None]:
    """Undo torch's handler that raises when a worker dies, wherever the main thread is: in the middle of a step, say.

    Without it the death is noticed where its batch is missed, within five seconds.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Ctrl-C while workers start would end each of them in a traceback; it is delivered afterwards instead."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
