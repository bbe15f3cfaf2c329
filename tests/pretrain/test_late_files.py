"""A node that sees late what another one has written gets some time before it is refused."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain import late_files
from pretrain.errors import RunError
from pretrain.late_files import newest_checkpoint, wait_for_data
from pretrain.stop import StopRequest
from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import SMALL, losses
from tests.pretrain.two_ranks import pretrain_on_two_ranks


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_files, "PATIENCE", 0.3)
    monkeypatch.setattr(late_files, "PAUSE", 0.02)


def test_data_that_appears_is_waited_for_and_the_first_rank_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    folder = tmp_path / "train"
    monkeypatch.setenv("RANK", "0")
    wait_for_data(str(folder))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    wait_for_data("s3://bucket/train")
    wait_for_data(str(tmp_path / "{00..03}.tar"))
    wait_for_data(str(tmp_path))
    assert capsys.readouterr().err == ""
    wait_for_data(str(folder))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rank 1 on ") and f"{folder} is not there; a network disk may show it late" in line
    monkeypatch.setattr(late_files, "PATIENCE", 100)
    threading.Timer(0.1, folder.mkdir).start()
    wait_for_data(str(folder))
    assert folder.is_dir()


DAMAGED = RunError("none of them is whole")


def look(seen: list[int | RunError | None], others: list[int]) -> Any:
    """Step of what a rank finds that sees these one after the other, while others see theirs."""
    seen = list(seen)

    def checkpoint() -> Any:
        step = seen.pop(0) if len(seen) > 1 else seen[0]
        if isinstance(step, RunError):
            raise step
        return None if step is None else (Path("last.ckpt"), {"global_step": step}, [])

    stop = StopRequest()
    stop.gather = lambda value: [value, *others]  # type: ignore[method-assign]
    directory: Any = SimpleNamespace(checkpoint=checkpoint, checkpoints=Path("none"))
    found = newest_checkpoint(directory, stop, together=True)
    return None if found is None else found[1]["global_step"]


@pytest.mark.parametrize(
    ("seen", "others", "expected", "waits"),
    [
        ([None], [-1], None, False),
        ([6], [6, -1], 6, False),
        ([None, None, 6], [6], 6, True),
        ([3, 3, 6], [6], 6, True),
        ([DAMAGED, DAMAGED, 6], [6], 6, True),
        ([None], [6], None, True),  # not in the end either
        ([3], [6], 3, True),
    ],
)
def test_a_checkpoint_that_another_rank_sees_is_waited_for(
    seen: list[int | RunError | None], others: list[int], expected: int | None, waits: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert look(seen, others) == expected
    assert ("the checkpoint of step 6 in none is not there" in capsys.readouterr().err) == waits


@pytest.mark.parametrize("others", [[6], [-1]])
def test_checkpoints_of_which_none_is_whole_are_refused(others: list[int]) -> None:
    with pytest.raises(RunError, match="none of them is whole"):
        look([DAMAGED], others)


LATE = """
import os
from pretrain.run_directory import RunDirectory
see, looks = RunDirectory.checkpoint, []
def late(directory):
    looks.append(0)
    return None if os.environ["RANK"] == "1" and len(looks) < 3 else see(directory)
RunDirectory.checkpoint = late
"""


@pytest.mark.slow
def test_ranks_go_on_together_when_one_sees_the_checkpoint_late(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*SMALL, "--data.train", drawn, "--checkpoint_every", 3, "--output", run, "--trainer.strategy", "ddp"]
    longer = ["--trainer.max_steps", 5, "--allow_changes", "[trainer.max_steps]"]
    assert pretrain(*command, "--trainer.strategy", "auto", "--trainer.max_steps", 3) == 0
    pretrain_on_two_ranks([[*command, *longer]], tmp_path, LATE)
    assert list(losses(run)) == [1, 2, 3, 4, 5]
