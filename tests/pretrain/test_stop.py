"""What ranks agree on, as far as one process shows it; several: test_ranks_fail.py."""

import os
import signal

import pytest

from datamodules.errors import DataError
from pretrain import cli
from pretrain.errors import AgreedFailure, Interrupted
from pretrain.stop import SIGNALS, StopRequest


def test_a_failure_is_raised_where_the_ranks_agree_and_once() -> None:
    stop, error = StopRequest(), DataError("no")
    stop.fail(error)
    stop.fail(DataError("later"))
    with pytest.raises(DataError) as caught:
        stop.agree()
    assert caught.value is error
    assert stop.agree() is False and stop.agree(bad=True) is True
    assert stop.gather("x") == ["x"]


def test_a_signal_is_remembered_and_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    stop = StopRequest()
    stop.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    stop.agree()
    assert stop.agreed == signal.SIGUSR1
    stop.silence()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_process_that_ends_with_its_run_is_not_disturbed_while_it_leaves() -> None:
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    stop = StopRequest(last=True)
    stop.silence()  # training has not begun: a signal does what it does to any program
    assert {signum: signal.getsignal(signum) for signum in SIGNALS} == before
    stop.listen()
    try:
        stop.silence()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_what_all_ranks_know_the_first_one_tells(
    rank: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    for error, code in ((AgreedFailure("all", 2), 2), (AgreedFailure("all", 1), 1), (Interrupted("", 15), 99)):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("datamodules.verify.verify_command", fail)
        assert cli.main(["shards", "verify", "x"]) == code
        assert bool(capsys.readouterr().err) is told
