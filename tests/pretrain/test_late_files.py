"""A node that sees late what another one has written gets some time before it is refused."""

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint_files, late_files
from pretrain.checkpoint_files import LAST, PREVIOUS
from pretrain.errors import RunError
from pretrain.late_files import newest_checkpoint, wait_for_data
from pretrain.run_directory import RunDirectory
from pretrain.stop import StopRequest
from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import SMALL, losses
from tests.pretrain.test_checkpoint_files import cut, spoilt_files, write
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


class Ranks:
    """Threads in the place of ranks, each on a node that has its own view of the disk; the first is on node 0."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes = [RunDirectory(folder / f"node{rank}") for rank in range(3)]
        for node in self.nodes:
            node.checkpoints.mkdir(parents=True)
        self.read: list[str] = []
        self._said: list[Any] = [None] * len(self.nodes)
        self._barrier = threading.Barrier(len(self.nodes), timeout=20)
        monkeypatch.setattr(late_files, "launched_rank", lambda: int(threading.current_thread().name))
        damage = checkpoint_files.damage
        monkeypatch.setattr(checkpoint_files, "damage", lambda path: self.read.append(path.name) or damage(path))

    def gather(self, value: Any) -> list[Any]:
        self._said[late_files.launched_rank()] = value
        self._barrier.wait()
        told = list(self._said)
        self._barrier.wait()
        return told

    def look(self) -> list[Any]:
        """Step and findings of each, or why it was refused."""
        found: list[Any] = [None] * len(self.nodes)

        def one(rank: int) -> None:
            stop = StopRequest()
            stop.gather = self.gather  # type: ignore[method-assign]
            try:
                seen = newest_checkpoint(self.nodes[rank], stop, together=True)
                assert seen is None or seen[0].parent == self.nodes[rank].checkpoints
                found[rank] = None if seen is None else (seen[1]["global_step"], len(seen[2]))
            except RunError as error:
                found[rank] = (error.exit_code, error.told_once, re.sub(r"/node\d/", "/", str(error)))

        threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in range(len(self.nodes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return found


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(tmp_path, monkeypatch)


def test_the_first_rank_alone_reads_all_bytes(ranks: Ranks) -> None:
    assert ranks.look() == [None] * 3
    for node in ranks.nodes:
        write(node.checkpoints / PREVIOUS, 3, "folder")
        write(node.checkpoints / LAST, 6, "folder")
    assert ranks.look() == [(6, 0)] * 3 and ranks.read == [LAST]
    for node in ranks.nodes:
        cut(spoilt_files(node.checkpoints / LAST)[-1], 0.5)
    assert ranks.look() == [(3, 1)] * 3 and ranks.read[1:] == [LAST, PREVIOUS]
    for node in ranks.nodes:
        cut(spoilt_files(node.checkpoints / PREVIOUS)[-1], 0.5)
    told = ranks.look()
    assert told == [told[0]] * 3 and told[0][:2] == (2, True) and "previous.ckpt is damaged" in told[0][2]


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("before", [None, 3])
@pytest.mark.parametrize("comes", [True, False])
def test_a_checkpoint_that_another_rank_sees_is_waited_for(
    comes: bool, before: int | None, late: int, ranks: Ranks, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In the end none goes on without it: that would be from another step, or write over it."""
    for rank, node in enumerate(ranks.nodes):
        if rank != late:
            write(node.checkpoints / LAST, 6, "file")
        elif before is not None:
            write(node.checkpoints / LAST, before, "file")
    if comes:
        monkeypatch.setattr(late_files, "PATIENCE", 20)
        threading.Timer(0.1, write, (ranks.nodes[late].checkpoints / LAST, 6, "file")).start()
        assert ranks.look() == [(6, 0)] * 3
    else:
        told = ranks.look()
        assert told == [told[0]] * 3 and told[0][:2] == (2, True)
        assert re.match(rf"rank {late} on .* does not see the checkpoint of step 6 in ", told[0][2])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rank {late} on ") and "the checkpoint of step 6 in " in line


def test_ranks_that_lightning_starts_later_do_not_read_all_bytes_again(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, stop, parent = ranks.nodes[0], StopRequest(), os.getppid()
    monkeypatch.setenv(late_files.LOOKED, "[0, 0]")

    def look(rank: int, parent: int) -> int | None:
        monkeypatch.setattr(late_files, "launched_rank", lambda: rank)
        monkeypatch.setattr(os, "getppid", lambda: parent)
        found = newest_checkpoint(node, stop, together=False)
        return None if found is None else found[1]["global_step"]  # type: ignore[no-any-return]

    assert look(0, parent) is None and look(1, os.getpid()) is None
    write(node.checkpoints / LAST, 6, "file")
    assert look(0, parent) == look(1, os.getpid()) == look(2, os.getpid()) == 6 and ranks.read == [LAST]
    assert look(0, parent) == 6 and ranks.read == [LAST] * 2, "a new run looks itself"
    assert look(1, parent) == 6 and ranks.read == [LAST] * 3, "that was told by another process"


LATE = """
import os
from pretrain import checkpoint_files, late_files
from pretrain.checkpoint_files import LAST, PREVIOUS
see, looks = late_files.load_pieces, []
def late(path):
    looks.append(0)
    if os.environ["RANK"] == "1" and len(looks) < 6:
        raise FileNotFoundError(path)
    return see(path)
late_files.load_pieces = late
"""


@pytest.mark.slow
def test_ranks_go_on_together_when_one_sees_the_checkpoint_late(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*SMALL, "--data.train", drawn, "--checkpoint_every", 3, "--output", run, "--trainer.strategy", "ddp"]
    longer = ["--trainer.max_steps", 5, "--allow_changes", "[trainer.max_steps]"]
    assert pretrain(*command, "--trainer.strategy", "auto", "--trainer.max_steps", 3) == 0
    pretrain_on_two_ranks([[*command, *longer]], tmp_path, LATE)
    assert list(losses(run)) == [1, 2, 3, 4, 5]
