"""What probes that take hours cannot do: be shared among processes, and go on in the middle of one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def alone_words(names: Sequence[str], processes: int) -> str:
    """What is said when several processes were started for probes that one of them does."""
    many = len(names) > 1
    return (
        f"note: {', '.join(names)} run{'' if many else 's'} in the first of the {processes} processes: the others help "
        f"with features alone and then wait. One process takes as long for {'them' if many else 'it'}"
    )


@contextmanager
def told_when_stopped(left: Sequence[str], place: Path | None, in_floor: bool = False) -> Iterator[None]:
    """Ctrl-C while the first of these probes is at work: KeyboardInterrupt says how to go on.

    Args:
        left: probes that are not done.
        place: the results.json that has what was done before; None: it was not kept.
        in_floor: the first one's own score is done, and its floor is at work.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if in_floor and place:
            rest = f"Go on with --probes {','.join(left[1:])}; the" if left[1:] else "The"
            raise KeyboardInterrupt(
                f"interrupted in the floor of {left[0]}: its score is in {place}, only the floor is missing. "
                f"{rest} floor comes when {left[0]} is scored again"
            ) from stop
        kept = f"what was scored before is in {place}" if place else "nothing was kept, since there is no --output"
        raise KeyboardInterrupt(
            f"interrupted in {left[0]}, which cannot go on in the middle; {kept}. Go on with "
            f"--probes {','.join(left)}: features and finished floors are not made again"
        ) from stop
