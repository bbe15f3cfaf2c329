"""The file of samples, and how files of lines are cut back where a run goes on."""

from pathlib import Path

import pytest

from pretrain.cut_back import cut_back
from tests.pretrain.conftest import pretrain
from tests.pretrain.processes import samples


@pytest.mark.parametrize("step", [0, 1, 3, 9])
def test_cut_back(step: int, tmp_path: Path) -> None:
    lines = [f'{{"step": {i}, "keys": ["a.tar/{i}"]}}\n' for i in range(1, 6)]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(lines) + '{"step": 6, "ke')
    cut_back(path, step)
    assert path.read_text() == "".join(lines[:step])

    table = ["step,epoch\r\n", *(f"{10 * i},0.5\r\n" for i in range(1, 6))]
    path = tmp_path / "metrics.csv"
    path.write_text("".join(table) + "60,0.5\r", newline="")
    cut_back(path, 10 * step + 9)
    assert path.read_bytes().decode() == "".join(table[: 1 + step])


@pytest.mark.parametrize("text", ["", "step,ep", "no\nsteps\n"])
def test_cut_back_what_has_no_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    cut_back(path, 5)
    assert path.read_text() == ("no\n" if "no" in text else "")
    cut_back(tmp_path / "nothing", 5)
    assert not (tmp_path / "nothing").exists()


def test_only_when_asked_for(small: list[str], tmp_path: Path) -> None:
    short = [*small, "--trainer.max_steps", 3, "--output"]
    assert pretrain(*short, tmp_path / "a") == 0
    assert not (tmp_path / "a/samples.jsonl").exists()
    assert pretrain(*short, tmp_path / "b", "--log_keys", "true") == 0
    found = samples(tmp_path / "b")
    assert list(found) == [1, 2, 3] and all(len(keys) == 16 for keys in found.values())
    assert len({key for keys in found.values() for key in keys}) == 48
