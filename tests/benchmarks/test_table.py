import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.check import fallen, main
from benchmarks.table import Row, compared, show, write


def test_a_row_is_of_the_medians_and_knows_how_turns_differ() -> None:
    row = compared("step", "small", "images/s", [20.0, 22.0, 30.0], [10.0, 11.0, 10.0], "plain")
    assert (row.ours, row.baseline, row.ratio) == (22, 10, 2.2)
    assert row.noise == pytest.approx(2 / 22)  # the turns' ratios are 2, 2 and 3
    assert compared("step", "small", "ms", [10.0], [20.0], "plain").noise is None
    assert compared("step", "small", "ms", [10.0], [20.0], "plain").ratio == 2
    assert show([row]).splitlines()[-1] == "| step | small | images/s | 22 | 10 | 2.200 | 9.1% | plain |"


def rows(*ratios: float, noise: float | None = 0.01) -> dict[str, object]:
    made = [Row("step", f"size {i}", "images/s", ratio, 1.0, "plain", noise) for i, ratio in enumerate(ratios)]
    return {"machine": "x", "rows": [{**asdict(row), "ratio": row.ratio} for row in made]}


def test_what_fell_by_more_than_noise_is_named() -> None:
    assert fallen(rows(1.9, 3.0), rows(2.0, 2.0)) == [], "5% less, or 3 times the noise of both, is nothing"
    (told,) = fallen(rows(1.8, 2.0), rows(2.0, 2.0))
    assert told.startswith("step, size 0, images/s: 1.80, was 2.00")
    assert fallen(rows(1.8, noise=0.02), rows(2.0, noise=0.02)) == []
    assert fallen(rows(1.5, noise=None), rows(2.0, noise=None)) == []
    assert fallen(rows(1.3, noise=None), rows(2.0, noise=None)) != []
    assert fallen(rows(2.0), rows(2.0, 1.5)) == ["step, size 1, images/s: not measured now"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now, before = tmp_path / "now.json", tmp_path / "before.json"
    assert main([str(now), str(before)]) == 2
    write([Row("step", "small", "ms", 1.0, 2.0, "plain")], now)
    content = json.loads(now.read_text())
    before.write_text(json.dumps(content))
    assert main([str(now), str(before)]) == 0
    content["rows"][0]["ratio"] = 9.0
    before.write_text(json.dumps(content))
    assert main([str(now), str(before)]) == 1
    assert "step, small, ms: 2.00, was 9.00" in capsys.readouterr().out
