"""Weighted nearest neighbours, the vote of DINO (Caron et al. 2021, arXiv:2104.14294, section 4.1 and appendix E).

Axes: n = train samples, t = test samples, d = width, k = neighbours, c = classes.
The search is exact, and never holds more than a block of train against a block of test, so features may stay on disk.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.errors import EvaluationError
from evaluation.progress import progress_bar
from evaluation.ranks import rank_of_truth

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
TRAIN_BLOCK_BYTES = 256 << 20
TEST_BLOCK = 4096
SIMILARITY_BYTES = 512 << 20
VOTE_BLOCK = 1024

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def unit(x: Floats) -> Floats:
    """Rows scaled to length 1 in float32; raises EvaluationError where a feature is NaN or infinite."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if not np.isfinite(norm).all():
        raise EvaluationError(
            "features contain NaN or infinite values: the encoder has diverged, evaluate an earlier checkpoint"
        )
    return np.asarray(x / np.maximum(norm, 1e-12), dtype=np.float32)


def nearest(train: Floats, test: Floats, k: int, device: str = "cpu", progress: bool = False) -> tuple[Floats, Ints]:
    """The k train rows of highest cosine similarity for each test row, best first; equal ones by their index.

    train [n d], test [t d] -> similarity [t k], index [t k]. Exact inner products (faiss on the CPU, torch elsewhere),
    merged block by block: the memory is one block of train (256 MB), one of test, and the result.
    Raises EvaluationError when train has fewer than k rows or a feature is not finite.
    """
    if k < 1 or k > len(train):
        raise EvaluationError(
            f"kNN with k = {k} needs at least {k} train images, there are {len(train)}: "
            f"lower it with --set ks={max(1, len(train))}"
        )
    search = search_faiss if torch.device(device).type == "cpu" else partial(search_torch, device=device)
    rows = max(1, TRAIN_BLOCK_BYTES // (4 * train.shape[1]))
    similarity = np.full((len(test), k), -np.inf, dtype=np.float32)
    index = np.zeros((len(test), k), dtype=np.int64)
    with progress_bar(-(-len(train) // rows) * len(test), "search", "neighbours", progress) as bar:
        for start in range(0, len(train), rows):
            block = unit(train[start : start + rows])
            for first in range(0, len(test), TEST_BLOCK):
                chosen = slice(first, first + TEST_BLOCK)
                near, where = search(unit(test[chosen]), block, min(k, len(block)))
                near = np.concatenate([similarity[chosen], near], axis=1)
                where = np.concatenate([index[chosen], where + start], axis=1)
                best = np.lexsort((where, -near), axis=1)[:, :k]
                similarity[chosen] = np.take_along_axis(near, best, axis=1)
                index[chosen] = np.take_along_axis(where, best, axis=1)
                bar.update(len(near))
    return similarity, index


def search_faiss(test: Floats, block: Floats, k: int) -> tuple[Floats, Ints]:
    """Largest inner products of each test row [t d] with a block [n d], and where: [t k] each; on the CPU."""
    import faiss

    near, where = faiss.knn(test, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return near, where


def search_torch(test: Floats, block: Floats, k: int, device: str) -> tuple[Floats, Ints]:
    """The same on any device, with at most SIMILARITY_BYTES of products at a time."""
    rows = torch.from_numpy(block).to(device)
    near, where = [], []
    step = max(1, SIMILARITY_BYTES // (4 * len(block)))
    for start in range(0, len(test), step):
        found = (torch.from_numpy(test[start : start + step]).to(device) @ rows.T).topk(k, dim=1)
        near.append(found.values.cpu().numpy())
        where.append(found.indices.cpu().numpy())
    return np.concatenate(near), np.concatenate(where)


def votes(similarity: Floats, label: Ints, classes: int, temperature: float = TEMPERATURE) -> NDArray[np.float64]:
    """Sum of exp(similarity / temperature) per class; similarity [t k], label of each neighbour [t k] -> [t c]."""
    cell = np.arange(len(label))[:, None] * classes + label
    weight = np.exp(similarity.astype(np.float64) / temperature)
    total = np.bincount(cell.ravel(), weight.ravel(), minlength=len(label) * classes)
    return total.astype(np.float64, copy=False).reshape(len(label), classes)


def vote_ranks(score: NDArray[np.float64], truth: Ints) -> Ints:
    """Rank of the true class in each row of votes [t c]; a class without any vote is never found (rank c) -> [t]."""
    voted = np.take_along_axis(score, truth[:, None], axis=1)[:, 0] > 0
    return np.where(voted, rank_of_truth(score, truth), score.shape[1])


def knn_ranks(
    train: Floats,
    train_label: Ints,
    test: Floats,
    test_label: Ints,
    *,
    classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: str = "cpu",
    progress: bool = False,
) -> dict[int, Ints]:
    """Rank of the true class among the votes, for each k: {k: [t]}; top-1 is the share of rank 0, top-5 of rank < 5.

    One search for the largest k serves all. Raises EvaluationError as `nearest` does.
    """
    similarity, index = nearest(train, test, max(ks), device, progress)
    label = np.asarray(train_label)[index]
    ranks = {k: np.empty(len(test), dtype=np.int64) for k in ks}
    for first in range(0, len(test), VOTE_BLOCK):
        rows = slice(first, first + VOTE_BLOCK)
        for k, rank in ranks.items():
            rank[rows] = vote_ranks(
                votes(similarity[rows, :k], label[rows, :k], classes, temperature), test_label[rows]
            )
    return ranks
