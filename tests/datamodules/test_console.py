"""Tables and lines for a terminal."""

import multiprocessing
import sys

from tqdm import tqdm

from datamodules.console import one_line, table, tell


def test_columns_are_aligned(capsys) -> None:
    assert table(("what", "count", "share"), [("a long name", 12, "5%"), ("b", 12345, "95%")]).splitlines() == [
        "what          count  share",
        "a long name      12     5%",
        "b            12,345    95%",
    ]
    assert table(("a", "b"), []) == "a  b"
    tell("a line")
    assert capsys.readouterr().err == "a line\n"


def test_a_worker_leaves_the_bar_to_the_process_that_draws_it(capfd) -> None:
    with tqdm(total=10, desc="bar", file=sys.stderr):
        worker = multiprocessing.get_context("fork").Process(target=tell, args=("from a worker",))
        worker.start()
        worker.join()
        err = capfd.readouterr().err
        assert "from a worker\n" in err and err.count("bar:") <= 1
        tell("from here")
        assert "from here\n" in capfd.readouterr().err


def test_nothing_unprintable() -> None:
    assert one_line("a\n\tb\x1b[31m \u202ec") == "a b [31m c"
    assert "\x1b" not in table(("x",), [("\x1b[2J",)])
