"""The linear probe of DINOv2: many heads, which differ in rate and in what they see, in one pass over augmented crops.

Oquab et al. 2023 (arXiv:2304.07193): 13 rates x the last 1 or 4 blocks' class tokens x with or without
the mean of the last patch tokens; SGD of momentum 0.9 without weight decay, batch 1,024, 12,500 steps, cosine. The
authors choose the best head on the test images; here it is chosen on a part of train.

Axes: b = images, c = channels, h w = pixels, d = width, f = channels of what a head sees, k = classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluation.errors import EvaluationError
from evaluation.frozen_heads import cosine, frozen, ranks_of_heads, train_heads
from evaluation.image_data import ImageData, parts_of
from evaluation.linear import stratified_order
from evaluation.ranks import UNSEEN, top
from tasks.block_tokens import last_block_tokens
from tasks.encoders import Encoder

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOST_HELD_OUT = 20_000

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LinearPaper:
    """The protocol of DINOv2.

    Args:
        rates: base rates, times batch / 256.
        blocks: how many of the last blocks' class tokens a head sees.
        steps: of the optimiser.
        batch_size: images in a step.
        held_out: share of train on which the head is chosen, at most 20,000 images.
    """

    rates: Sequence[float] = RATES
    blocks: Sequence[int] = (1, 4)
    steps: int = 12_500
    batch_size: int = 1024
    held_out: float = 0.1

    def check(self) -> None:
        """EvaluationError for what cannot be trained."""
        sizes = min(self.steps, self.batch_size, *self.blocks) if self.blocks else 0
        if sizes < 1 or not self.rates or min(self.rates) <= 0 or not 0 < self.held_out < 1:
            raise EvaluationError("linear_paper needs rates, blocks, steps, batch_size above 0, held_out in (0, 1)")


class Sweep(NamedTuple):
    """Rank of the true class [t] by the best head, its name, what it sees, and every head's held-out top-1 in percent.

    `diverged`: heads whose loss or scores were not finite, which could not be chosen.
    """

    rank: Ints
    best: str
    head_sees: str
    held_out: dict[str, float]
    diverged: list[str]
    steps: int
    batch_size: int
    chosen_on: int


class _Head(nn.Module):
    """Logits from one of the kinds of features that heads see."""

    def __init__(self, kind: int, width: int, classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(width, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, seen: Sequence[Tensor]) -> Tensor:
        """[b f] of every kind -> [b k]."""
        return self.linear(seen[self.kind])  # type: ignore[no-any-return]


def linear_paper(encoder: Encoder, data: ImageData, config: LinearPaper, seed: int = 0) -> Sweep:
    """Train all heads, choose one on held-out train images, and rank the classes of the test images by it.

    Encoders without class token, and those that are no plain ViT, are seen by the mean of the last patch tokens only.

    Raises:
        EvaluationError: settings or data that cannot be trained on.
    """
    config.check()
    order, fitted = held_out_order(data, config.held_out, seed, "linear_paper")
    batch_size, _ = parts_of(min(config.batch_size, fitted), data.batch_size)
    encoder = encoder.to(data.device).eval()
    kinds = _kinds(encoder, config.blocks)
    tokens = frozen(partial(see, encoder, kinds), data)
    heads: dict[str, nn.Module] = {}
    sees: dict[str, str] = {}
    groups = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for (number, (blocks, mean)), rate in product(enumerate(kinds), config.rates):
            head = _Head(number, encoder.width * (blocks + mean), data.classes).to(data.device)
            name = f"{_seen(blocks, mean)}, rate {rate:g}"
            heads[name], sees[name] = head, _seen(blocks, mean)
            groups.append({"params": list(head.parameters()), "lr": rate * batch_size / 256})
    diverged = train_heads(
        encoder, tokens, heads, torch.optim.SGD(groups, momentum=0.9), cosine, data, data.train_rows[order[:fitted]],
        batch_size=batch_size, steps=config.steps, seed=seed, name="linear_paper",
    )  # fmt: skip
    fine = {name: head for name, head in heads.items() if name not in diverged}
    rank, best, held = choose(encoder, tokens, fine, data, order[fitted:], "linear_paper")
    diverged += [name for name in fine if name not in held]
    return Sweep(rank, best, sees[best], held, diverged, config.steps, batch_size, len(order) - fitted)


def choose(
    encoder: Encoder, tokens: Callable[[Tensor], Any], heads: Mapping[str, nn.Module], data: ImageData, rows: Ints,
    probe: str,
) -> tuple[Ints, str, dict[str, float]]:  # fmt: skip
    """The head that is best on those of the train images (positions): ranks on test [t], its name, top-1 of every head.

    A head with a score that is not finite is none of them.

    Raises:
        EvaluationError: there is no other one.
    """
    found = ranks_of_heads(encoder, tokens, heads, data.held_out(np.sort(rows)), f"{probe}: choosing")
    held = {name: top(rank[rank != UNSEEN]) for name, rank in found.items() if (rank < data.classes).all()}
    if not held:
        raise EvaluationError(f"{probe}: the scores of no head are finite: lower the rates")
    best = max(held, key=lambda name: held[name])
    return ranks_of_heads(encoder, tokens, {best: heads[best]}, data, f"{probe}: test")[best], best, held


def held_out_order(data: ImageData, share: float, seed: int, name: str) -> tuple[Ints, int]:
    """All positions in data.train_rows, those to fit on first, and how many they are."""
    share = min(share, MOST_HELD_OUT / len(data.train_label))
    order, fitted = stratified_order(data.train_label, share, seed)
    if len(np.unique(data.train_label)) < 2 or fitted in (0, len(order)):
        raise EvaluationError(f"{name} needs two classes in train, and two images of one, to choose on")
    return order, fitted


def see(encoder: Encoder, kinds: Sequence[tuple[int, bool]], images: Tensor) -> list[Tensor]:
    """Images [b c h w] -> [b f] of each kind: so many class tokens, with the mean patch token or without."""
    tokens = last_block_tokens(encoder, images, max(1, max(blocks for blocks, _ in kinds)))
    mean = tokens[-1].patches.mean(dim=1)
    return [
        torch.cat(
            [*(each.prefix[:, 0] for each in tokens[len(tokens) - blocks :]), *([mean] if with_mean else [])], dim=1
        )
        for blocks, with_mean in kinds
    ]


def _kinds(encoder: Encoder, blocks: Sequence[int]) -> list[tuple[int, bool]]:
    if not encoder.maskable or not encoder.config.class_token:
        return [(0, True)]
    deepest = len(encoder.blocks)
    few = sorted({min(count, deepest) for count in blocks})
    return [(count, mean) for count in few for mean in (False, True)]


def _seen(blocks: int, mean: bool) -> str:
    return " + ".join([*([f"{blocks} class tokens"] if blocks else []), *(["mean patch"] if mean else [])])
