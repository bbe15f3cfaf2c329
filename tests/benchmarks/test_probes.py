import re

import pytest

from benchmarks.probes import measure


def test_both_sides_find_the_same() -> None:
    rows = measure(800, 200, None)
    assert [(row.name, row.against) for row in rows] == [
        ("kNN", "scikit-learn"),
        ("kNN", "a torch loop"),
        ("linear probe", "scikit-learn"),
        ("linear probe", "torch's L-BFGS"),
    ]
    for row in rows:
        ours, theirs = map(float, re.findall(r"top-1 ([\d.]+) and ([\d.]+)", row.note)[0])
        assert ours == pytest.approx(theirs, abs=1.01) and ours > 8
        assert row.ours > 0 and row.baseline > 0


def test_memory_does_not_grow_with_the_features() -> None:
    (*_, row) = measure(120, 20, (20_000, 64, 200))
    assert row.unit == "MiB" and 0 < row.ours < 120
