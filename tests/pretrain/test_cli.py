"""The command itself: quick, honest exit codes, one line for what a user did wrong."""

import errno
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cli import main, user_message

HEAVY = ("torch", "lightning", "timm", "torchvision", "webdataset", "numpy", "PIL")


def test_help_imports_nothing_heavy_and_answers_in_a_second() -> None:
    code = (
        "import sys, pretrain.cli as c\n"
        "try: c.main(['--help'])\n"
        f"except SystemExit: print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")
    # CPU time, because a busy machine must not fail this: start of Python included, 0.1 s here
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([Path(sys.executable).parent / "trivit", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["shards"], ["evaluate"], ["evaluate", "x"], ["report"], ["shards", "pack", "x"],
     ["shards", "verify", "x", "--nonsense", "1"], ["pretran"], ["shards", "synth", "x", "--samples", "abc"],
     ["evaluate", "x", "--train", "y"]],
)  # fmt: skip
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("trivit: ") and lines[0].endswith("--help")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--image-size", "0", "--image-size: 0 is no number of pixels"), ("--image-size", "-5", "--image-size: -5 is no"),
     ("--image-size", "big", "--image-size: big is no"), ("--probes", "", "--probes names none"),
     ("--probes", " ,", "--probes names none")],
)  # fmt: skip
def test_a_value_that_means_nothing_is_refused_with_its_option(
    option: str, value: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "/no/run", "--train", "/no", "--test", "/no", option, value])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and told in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [["shards", "verify", "/no/such/folder"], ["shards", "inspect", "/no/such/folder"],
     ["shards", "pack", "/no/such/folder", "/tmp/never"], ["evaluate", "/no/run", "--train", "/no", "--test", "/no"],
     ["report", "/no/such/run"], ["export", "/no/such/file.ckpt", "/tmp/never.safetensors"],
     ["shards", "synth", "/tmp/never", "--samples", "0"]],
)  # fmt: skip
def test_a_wrong_path_is_one_line_and_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("trivit: ")


@pytest.mark.parametrize(
    ("said", "told"), [("", "interrupted; the same command"), ("x is unfinished", "x is unfinished")]
)
def test_an_interruption_has_one_ending(
    said: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt(said)

    monkeypatch.setattr("datamodules.pack.pack", interrupted)
    assert main(["shards", "pack", "a", "b"]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"trivit: {told}")


def test_ctrl_c_while_python_imports_is_no_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "import pretrain.start\n"  # what the installed command does first
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not done.stderr


def test_a_bug_is_not_dressed_up_as_a_users_mistake() -> None:
    assert user_message(ValueError("ours")) is None
    assert "disk is full" in (user_message(OSError(errno.ENOSPC, "No space left", "x.tar")) or "")
    assert "x.tar" in (user_message(PermissionError(errno.EACCES, "Permission denied", "x.tar")) or "")
