"""Tables and lines for a terminal."""

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


def test_nothing_unprintable() -> None:
    assert one_line("a\n\tb\x1b[31m \u202ec") == "a b [31m c"
    assert "\x1b" not in table(("x",), [("\x1b[2J",)])
