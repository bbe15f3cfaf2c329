"""kNN and linear probe against scikit-learn and plain PyTorch loops on the same features; memory of a large kNN.

Features are drawn: classes around random points, variances that fall as 1 / i along random directions, as those of
encoders do; 20,000 x 192 to learn from and 2,000 to score, 40 classes, float32. One thread, CPU seconds. Both sides
must agree about the accuracy, which the rows show.

Run: python -m benchmarks.probes
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.memory import resident_mib
from benchmarks.table import Row, show
from evaluation.knn import TEMPERATURE, knn_ranks
from evaluation.linear import LogisticRegression, Scaler, Table, scores
from evaluation.ranks import top

TRAIN, TEST, WIDTH, CLASSES, K, STRENGTH = 20_000, 2_000, 192, 40, 20, 1e-3
LARGE = (200_000, 384, 5_000)


def measure(train: int = TRAIN, test: int = TEST, large: tuple[int, int, int] | None = LARGE) -> list[Row]:
    torch.set_num_threads(1)
    x, label = drawn(train, 1)
    y, truth = drawn(test, 2)
    setting = f"{train:,} x {WIDTH}, {test:,} test images"
    rows = []
    knn = (knn_ours, {"scikit-learn": knn_sklearn, "a torch loop": knn_torch})
    linear = (linear_ours, {"scikit-learn": linear_sklearn, "torch's L-BFGS": linear_torch})
    for name, (ours, others) in {"kNN": knn, "linear probe": linear}.items():
        seconds, accuracy = timed(partial(ours, x, label, y, truth))
        for against, other in others.items():
            theirs, found = timed(partial(other, x, label, y, truth))
            told = f"top-1 {accuracy:.1f} and {found:.1f}"
            rows.append(Row(name, setting, "CPU s", seconds, theirs, against, note=told))
    if large is not None:
        n, width, t = large
        command = [sys.executable, "-m", "benchmarks.probes", "--child", str(n), str(width), str(t)]
        child = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        whole = 4 * n * width / 2**20
        told = f"{n:,} x {width} on disk, {t:,} test images, above what was there"
        rows.append(Row("kNN, peak memory", told, "MiB", json.loads(child.stdout), whole, "the features themselves"))
    return rows


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [n d] and labels [n]."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    points = fixed.normal(0, 0.35, (CLASSES, WIDTH))
    directions, _ = np.linalg.qr(fixed.normal(size=(WIDTH, WIDTH)))
    label = rng.integers(0, CLASSES, count)
    whole = (points[label] + rng.normal(0, 1.5, (count, WIDTH))) / np.arange(1, WIDTH + 1) ** 0.5
    return (whole @ directions).astype(np.float32), label


def timed(work: Callable[[], float]) -> tuple[float, float]:
    """CPU seconds, the shorter of two times, and what came out."""
    found, seconds = 0.0, []
    for _ in range(2):
        began = time.process_time()
        found = work()
        seconds.append(time.process_time() - began)
    return min(seconds), found


def knn_ours(x: np.ndarray, label: np.ndarray, y: np.ndarray, truth: np.ndarray) -> float:
    return top(knn_ranks(x, label, y, truth, classes=CLASSES, ks=(K,))[K])


def knn_sklearn(x: np.ndarray, label: np.ndarray, y: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.neighbors import KNeighborsClassifier

    vote = KNeighborsClassifier(K, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE))
    return 100 * float(vote.fit(x, label).score(y, truth))


def knn_torch(x: np.ndarray, label: np.ndarray, y: np.ndarray, truth: np.ndarray) -> float:
    train = torch.nn.functional.normalize(torch.from_numpy(x), dim=1)
    right = 0
    for start in range(0, len(y), 100):
        test = torch.nn.functional.normalize(torch.from_numpy(y[start : start + 100]), dim=1)
        near, where = (test @ train.T).topk(K, dim=1)
        votes = torch.zeros(len(test), CLASSES).scatter_add_(
            1, torch.from_numpy(label)[where], (near / TEMPERATURE).exp()
        )
        right += int((votes.argmax(1).numpy() == truth[start : start + 100]).sum())
    return 100 * right / len(y)


def linear_ours(x: np.ndarray, label: np.ndarray, y: np.ndarray, truth: np.ndarray) -> float:
    scaler = Scaler.of(x)
    table = Table(x, label, scaler, np.arange(len(x)))
    weight = LogisticRegression(table, CLASSES).fit(STRENGTH).point
    return 100 * float((scores(scaler(y), weight).argmax(1).numpy() == truth).mean())


def linear_sklearn(x: np.ndarray, label: np.ndarray, y: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression as Reference

    mean, std = x.mean(0), x.std(0)
    fitted = Reference(C=1 / (STRENGTH * len(x)), max_iter=1000).fit((x - mean) / std, label)
    return 100 * float(fitted.score((y - mean) / std, truth))


def linear_torch(x: np.ndarray, label: np.ndarray, y: np.ndarray, truth: np.ndarray) -> float:
    mean, std = x.mean(0), x.std(0)
    inputs, labels = torch.from_numpy((x - mean) / std), torch.from_numpy(label)
    layer = torch.nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=1000, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(layer(inputs), labels)
        value = value + STRENGTH / 2 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return 100 * float((layer(torch.from_numpy((y - mean) / std)).argmax(1).numpy() == truth).mean())


def child(n: int, width: int, t: int) -> float:
    """MiB that a kNN over memory-mapped features adds to the peak of this process."""
    import faiss  # noqa: F401 (its own memory is not the search's)

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        with path.open("wb") as file:
            for start in range(0, n, 10_000):
                file.write(rng.standard_normal((min(10_000, n - start), width), dtype=np.float32).tobytes())
        x = np.memmap(path, np.float32, "r", shape=(n, width))
        y = rng.standard_normal((t, width), dtype=np.float32)
        label, truth = rng.integers(0, 1000, n), rng.integers(0, 1000, t)
        before = resident_mib("VmRSS")
        knn_ranks(x, label, y, truth, classes=1000)
        return resident_mib("VmHWM") - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=int, nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        print(child(*arguments.child))
    else:
        print(show(measure()))
