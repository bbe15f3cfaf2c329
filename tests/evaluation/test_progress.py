import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from evaluation import progress
from evaluation.features import extract
from evaluation.progress import Lines, progress_bar
from tasks.encoder_files import load_encoder


def test_a_log_has_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress_bar(1000, "img", "features") as bar:
        for _ in range(10):
            now += 11
            bar.update(100)
            bar.set_postfix(loss="0.5")
    assert capsys.readouterr().err.splitlines() == [
        "features: 30%, 300 of 1000 img [00:33<01:17,  9.09img/s, loss=0.5]",
        "features: 60%, 600 of 1000 img [01:06<00:43,  9.09img/s, loss=0.5]",
        "features: 90%, 900 of 1000 img [01:39<00:10,  9.09img/s, loss=0.5]",
        "features: 100%, 1000 of 1000 img [01:50<00:00,  9.09img/s, loss=0.5]",
    ]


def test_what_is_short_or_fails_or_shall_be_silent_says_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10, "img", "short") as bar:
        bar.update(10)
    with progress_bar(10, "img", "silent", show=False) as bar:
        assert isinstance(bar, tqdm)
        bar.update()
    with pytest.raises(ValueError, match="x"), Lines(10, "img", "fails") as lines:
        lines.last = 1e9
        raise ValueError("x")
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar(10, "img", "features") as bar:
        assert isinstance(bar, tqdm) and not bar.disable


def test_features_are_told_in_a_log(
    world: Path, cache: Path, encoder_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    extract(load_encoder(encoder_file), world / "test", device="cpu", workers=0, batch_size=20)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and told[0].startswith("features: 33%, 20 of 60 img [")
