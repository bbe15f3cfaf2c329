"""Ranks whose data differ all end before training, with one line."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datamodules.manifest import Manifest
from datamodules.shard_entry import Shard
from datamodules.synth import synth
from pretrain.errors import AgreedFailure
from pretrain.same_data import SameData, on_disk
from pretrain.stop import StopRequest
from tests.pretrain.processes import SMALL, end, start

SETTINGS = {"manifest": "a", "seed": 0, "global_batch_size": 16, "lanes": 16, "window": 4, "max_steps": 8}
PLACE = {"train": "/data", "samples": 96, "step": 0, "host": "node0"}


@pytest.mark.slow
def test_ranks_with_other_data_do_not_train(drawn: Path, tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    synth(other, samples=40, size=32, seed=4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    several = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.max_steps", -1, "--epochs", 2]
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    newer = "import sys; from pretrain import same_data as s; s.code_version = lambda: 'newer'; "
    newer += "from pretrain.cli import main; sys.exit(main())"
    ranks = [
        start([*SMALL, *several, "--output", run, "--data.train", folder, *more], *program, RANK=rank, LOCAL_RANK=rank,
              **places)
        for rank, folder, more, program in (
            ("0", drawn, [], []), ("1", other, ["--model.mask_ratio", "0.6"], [("-c", newer)])
        )
    ]  # fmt: skip
    (code, error), (other_code, other_error) = (end(rank, 90) for rank in ranks)
    assert code == other_code == 2, (error, other_error)
    assert "Traceback" not in error + other_error
    (line,) = [line for line in (error + other_error).splitlines() if line.startswith("trivit: ")]
    assert f"it has other data, {other} (40 images) instead of {drawn} (96 images)" in line
    assert "rank 1 on " in line and "its trainer.max_steps is 4 instead of 12" in line and "seed" not in line
    assert "its model.mask_ratio is 0.6 instead of 0.75" in line and "its code is newer instead of trivit" in line
    assert not (run / "metrics.csv").exists()


@pytest.mark.slow
def test_a_shard_that_one_node_lacks_ends_all_ranks_in_a_line(drawn: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(drawn, other)
    (other / "synth-000001.tar").unlink()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    several = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--output", tmp_path / "run", "--data.train"]
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    ranks = [
        start([*SMALL, *several, folder], RANK=rank, LOCAL_RANK=rank, **places)
        for rank, folder in (("0", drawn), ("1", other))
    ]
    (code, error), (other_code, other_error) = (end(rank, 90) for rank in ranks)
    assert code == other_code == 2 and "Traceback" not in error + other_error
    (line,) = [line for line in (error + other_error).splitlines() if line.startswith("trivit: ")]
    assert f"rank 1 on {socket.gethostname()} would not train as rank 0" in line
    assert f"it lacks 1 of the shards of {other} (first: synth-000001.tar)" in line
    assert not (tmp_path / "run/metrics.csv").exists()


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("cut off", "whole", "its shards in .* have other sizes"),
        ("gone", "whole", "rank 0 lacks 1 of the shards of .* a-000000.tar"),
        ("whole", "gone", "it lacks 1 of the shards of .* a-000000.tar"),
    ],
)
def test_shards_that_are_not_whole_everywhere(first: str, second: str, words: str, tmp_path: Path) -> None:
    """Few enough that each node alone would go on; that both lack the same is theirs to bear."""
    found = {}
    for name in ("whole", "cut off", "gone"):
        (tmp_path / name).mkdir()
        if name != "gone":
            (tmp_path / name / "a-000000.tar").write_bytes(b"x" * (2 if name == "whole" else 1))
        shards = (Shard("a-000000.tar", 1, 2, ""),)
        found[name] = dict(zip(("absent", "sizes"), on_disk(Manifest(tmp_path / name, shards)), strict=True))
    meet({"root": tmp_path / first}, found[first])
    with pytest.raises(AgreedFailure, match=words):
        meet({"root": tmp_path / first}, found[second])


def test_another_step_to_go_on_from_is_told() -> None:
    with pytest.raises(AgreedFailure, match="go on from step 3 instead of the beginning: the run must lie where"):
        meet({}, {"resumed": 3})


@pytest.mark.parametrize("changed", [key for key in SETTINGS if key != "manifest"])
def test_each_setting_is_compared(changed: str) -> None:
    with pytest.raises(AgreedFailure, match=rf"rank 2 on node2 .* its \w+\.{changed} is 7 instead of") as caught:
        meet({}, {}, {changed: 7, "host": "node2"})
    assert caught.value.exit_code == 2 and "other data" not in str(caught.value)


def test_other_files_of_the_same_name_are_other_data() -> None:
    with pytest.raises(AgreedFailure, match=r"other data, /data \(96 images\) instead of /data \(96 images\)"):
        meet({}, {"manifest": "b"})


def test_a_copy_in_another_folder_is_the_same_data() -> None:
    meet({}, {"train": "/local/data", "host": "node1"})
    meet({})


def meet(*ranks: dict[str, Any]) -> None:
    """The ranks, of whom this process is the first one, come together; each has some settings of its own."""
    stop = StopRequest()
    stop.gather = lambda value: [value, *({**value, **other} for other in ranks[1:])]  # type: ignore[method-assign]
    manifest = Manifest(
        ranks[0].get("root", Path("/")), (Shard("a-000000.tar", 1, 2, ""),) if "root" in ranks[0] else ()
    )
    data = SimpleNamespace(state_dict=lambda: {**PLACE, **SETTINGS, **ranks[0]}, manifest=manifest)
    trainer: Any = SimpleNamespace(datamodule=data, max_steps=SETTINGS["max_steps"])
    SameData(stop).setup(trainer, None, "fit")  # type: ignore[arg-type]
