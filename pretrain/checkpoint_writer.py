"""Who writes a checkpoint, and when: the run itself, which waits for the disk, or a thread beside it.

With a thread the run waits only for a copy of its state in the memory of the host. From that moment on the copy is all
that is written, whatever training changes meanwhile.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from tasks.sharded_files import mapped


class CheckpointWriter:
    """Carries out the parts of one checkpoint in order: at once, or in the `background`; never those of two at once.

    The process does not end before they are done, unless it is killed.
    """

    def __init__(self, background: bool = False) -> None:
        self.background = background
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._parts: list[Future[None]] = []

    def keep(self, state: Any) -> Any:
        """What may be written later: the state itself, or a copy of it on the host that nobody changes."""
        return mapped(state, _copied) if self.background else state

    def do(self, part: Callable[[], None]) -> None:
        """Carry this out behind the parts before it, and not at all if one of those has failed.

        Raises:
            OSError: what it raises, at once; in the background `wait` does.
        """
        if self._thread is None:
            part()
            return
        before = self._parts[-1:]

        def act() -> None:
            for one in before:
                one.result()  # which has ended, perhaps badly
            part()

        self._parts.append(self._thread.submit(act))

    @property
    def failed(self) -> bool:
        """Whether a part has failed and nobody has been told by `wait` yet."""
        return any(part.done() and part.exception() is not None for part in self._parts)

    def wait(self) -> None:
        """Until all parts are done; raises what the first bad one has raised, once."""
        parts, self._parts = self._parts, []
        failures = [failure for part in parts if (failure := part.exception()) is not None]
        if failures:
            raise failures[0]


def _copied(value: Any, _: str) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
