import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from evaluation import progress
from evaluation.features import extract
from evaluation.few_shot import FewShot
from evaluation.probes import PROBES, ProbeData, ProbeSettings
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


def test_neighbours_and_fits_are_told_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    x, label = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32), np.arange(60) % 3
    data = ProbeData(x, label, x[:12], label[:12], 3)
    quiet = ProbeSettings(ks=(5,), strengths=(1.0, 0.1), few_shot=FewShot(shots=(1,), shares=(), draws=2))
    for settings in (quiet, replace(quiet, progress=True)):
        for probe, words in (("knn", "neighbours: 100%, 12 of 12"), ("linear", "linear probe: 100%, 3 of 3 fit"),
                             ("few_shot", "few_shot: 100%, 2 of 2 fit")):  # fmt: skip
            PROBES[probe](data, settings)
            told = capsys.readouterr().err
            assert words in told if settings.progress else told == ""
    assert repr(quiet) == repr(settings), "floors in the cache do not depend on it"


def test_features_are_told_in_a_log(
    world: Path, cache: Path, encoder_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    extract(load_encoder(encoder_file), world / "test", device="cpu", workers=0, batch_size=20)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and told[0].startswith("features: 33%, 20 of 60 img [")
