import json
from multiprocessing import get_context
from pathlib import Path

import pytest

from datamodules.bad_samples import BadSample, BadSamples
from datamodules.errors import DataError


def bad(*numbers: int) -> list[BadSample]:
    return [BadSample("a.tar", f"{n}", "cut \u2026 \udcff off", 0) for n in numbers]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_is_named_once(tmp_path):
    account = BadSamples(tmp_path / "new" / "bad.jsonl", 0.5, 100, tmp_path)
    account.add(bad(1, 2, 1), 10)
    account.add(bad(2, 3), 20)
    account.add([], 30)
    assert [entry["key"] for entry in lines(tmp_path / "new" / "bad.jsonl")] == ["1", "2", "3"]
    assert set(lines(tmp_path / "new" / "bad.jsonl")[0]) == {"shard", "key", "reason", "epoch"}
    assert account.count == 3


def test_another_start_and_other_ranks_know_what_was_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    first, second = (BadSamples(path, 0.5, 100, tmp_path, rank=rank) for rank in range(2))
    first.add(bad(1, 2), 10)
    second.add(bad(2, 3), 10)
    assert second.count == 3
    first.add(bad(3), 10)
    assert BadSamples(path, 0.5, 100, tmp_path).count == first.count == 3
    assert [entry["key"] for entry in lines(path)] == ["1", "2"]
    assert [entry["key"] for entry in lines(tmp_path / "bad.rank1.jsonl")] == ["3"]


def test_a_line_cut_by_a_crash_is_passed_over(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"shard": "a.tar", "key": "1", "reason": "", "epoch": 0}\nnonsense\n[]\n{"shard": "a.t')
    assert BadSamples(path, 0.5, 100, tmp_path).count == 1


def test_budget(tmp_path):
    account = BadSamples(tmp_path / "bad.jsonl", 0.02, 100, tmp_path)
    account.add(bad(1, 2), 5)
    with pytest.raises(DataError, match=r"3 bad samples .*bad_sample_budget 0.02 .* a.tar, 3: cut .*verify") as caught:
        account.add(bad(3), 6)
    assert "\n" not in str(caught.value) and "bad.jsonl" in str(caught.value)
    assert len(lines(tmp_path / "bad.jsonl")) == 3


def test_the_file_of_another_rank_is_named_when_there_is_no_other(tmp_path):
    account = BadSamples(tmp_path / "bad.jsonl", 0.0, 100, tmp_path, rank=1)
    with pytest.raises(DataError, match=f"; all are named in {tmp_path}/bad.rank1.jsonl[.] "):
        account.add(bad(1), 10)
    assert lines(tmp_path / "bad.rank1.jsonl") and not (tmp_path / "bad.jsonl").exists()
    with pytest.raises(DataError, match=rf"named in {tmp_path}/bad\*[.]jsonl[.] "):
        BadSamples(tmp_path / "bad.jsonl", 0.0, 100, tmp_path).add(bad(2), 10)


def test_budget_of_a_large_set_follows_what_was_drawn(tmp_path):
    account = BadSamples(None, 0.01, 10**8, tmp_path)
    account.add(bad(*range(100)), 1000)  # 1% of ten thousand
    account.add(bad(*range(150)), 15_000)
    with pytest.raises(DataError):
        account.add(bad(*range(151)), 15_000)


def test_no_budget_at_all(tmp_path):
    with pytest.raises(DataError, match="1 bad samples"):
        BadSamples(None, 0.0, 100, tmp_path).add(bad(1), 100)


def add_many(path: Path, start: int) -> None:
    account = BadSamples(path, 1.0, 10_000, path.parent, rank=start // 1000)
    for n in range(start, start + 60):
        account.add(bad(n), 10)


def test_lines_of_several_processes_stay_whole(tmp_path):
    path, context = tmp_path / "bad.jsonl", get_context("fork")
    processes = [context.Process(target=add_many, args=(path, 1000 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    files = [path, tmp_path / "bad.rank1.jsonl", tmp_path / "bad.rank2.jsonl"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for start, file in enumerate(files):  # no rank writes into another one's file: NFS would lose lines
        assert [entry["key"] for entry in lines(file)] == [f"{1000 * start + n}" for n in range(60)]
    account = BadSamples(path, 1.0, 10_000, path.parent)
    assert account.count == 180 and account.where == f"{tmp_path}/bad*.jsonl"
