"""The attentive probe: a learned query gathers the frozen tokens by attention before the linear layer.

It reads what encoders keep in their patches, such as masked ones, without the mean's loss (Chen et al. 2022,
arXiv:2202.03026, section 4; the form that Bardes et al. 2024, arXiv:2404.08471, use). One block of cross-attention
(timm's AttentionPoolLatent) over all tokens of the last block, then a linear layer; AdamW, cosine after a warm-up. Of
several rates the best is chosen on a part of train, all are trained in one pass over augmented crops.

Axes: b = images, t = tokens, d = width, k = classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from evaluation.errors import EvaluationError
from evaluation.frozen_heads import frozen, train_heads
from evaluation.image_data import ImageData, parts_of
from evaluation.linear_mae import warmup_cosine
from evaluation.linear_paper import Sweep, choose, held_out_order
from tasks.encoders import Encoder


@dataclass(frozen=True)
class Attentive:
    """How the probe is trained.

    Args:
        rates: of AdamW, for a batch of any size.
        weight_decay: of matrices; biases, norms and the query have none.
        epochs: over what is left of train when some is held out.
        warmup: share of the steps.
        batch_size: images in a step.
        head_width: channels of an attention head.
        held_out: share of train on which the rate is chosen, at most 20,000 images.
    """

    rates: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3)
    weight_decay: float = 0.05
    epochs: int = 20
    warmup: float = 0.05
    batch_size: int = 1024
    head_width: int = 64
    held_out: float = 0.1

    def check(self) -> None:
        """EvaluationError for what cannot be trained."""
        fine = (
            min(self.epochs, self.batch_size, self.head_width) >= 1 and 0 <= self.warmup < 1 and 0 < self.held_out < 1
        )
        if not fine or not self.rates or min(self.rates) <= 0:
            raise EvaluationError(
                "attentive needs rates, epochs, batch_size and head_width above 0, warmup in [0, 1), held_out in (0, 1)"
            )


class AttentiveHead(nn.Module):
    """Tokens [b t d] -> logits [b k]."""

    def __init__(self, width: int, classes: int, head_width: int) -> None:
        super().__init__()
        heads = max(1, width // head_width)
        while width % heads:
            heads -= 1
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pool = AttentionPoolLatent(width, num_heads=heads, mlp_ratio=4.0, norm_layer=nn.LayerNorm)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b t d] -> [b k]."""
        return self.linear(self.pool(self.norm(tokens)))  # type: ignore[no-any-return]


def attentive(encoder: Encoder, data: ImageData, config: Attentive, seed: int = 0) -> Sweep:
    """Train a head with every rate, choose one on held-out train images, and rank the classes of the test images.

    Raises:
        EvaluationError: settings or data that cannot be trained on.
    """
    config.check()
    order, fitted = held_out_order(data, config.held_out, seed, "attentive")
    batch_size, _ = parts_of(min(config.batch_size, fitted), data.batch_size)
    steps = config.epochs * (fitted // batch_size)
    encoder = encoder.to(data.device).eval()
    tokens = frozen(partial(_all_tokens, encoder), data)
    heads: dict[str, nn.Module] = {}
    groups = []
    for rate in config.rates:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the heads differ in their rate alone
            head = AttentiveHead(encoder.width, data.classes, config.head_width).to(data.device)
        heads[f"rate {rate:g}"] = head
        groups += [group | {"lr": rate} for group in groups_of(head, config.weight_decay)]
    diverged = train_heads(
        encoder, tokens, heads, torch.optim.AdamW(groups), warmup_cosine(config.warmup), data,
        data.train_rows[order[:fitted]], batch_size=batch_size, steps=steps, seed=seed, name="attentive", in_parts=True,
    )  # fmt: skip
    fine = {name: head for name, head in heads.items() if name not in diverged}
    rank, best, held = choose(encoder, tokens, fine, data, order[fitted:], "attentive")
    diverged += [name for name in fine if name not in held]
    sees = "all tokens of the last block, gathered by a learned query"
    return Sweep(rank, best, sees, held, diverged, steps, batch_size, len(order) - fitted)


def groups_of(head: AttentiveHead, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay, and those that do not: biases, norms and the query."""
    apart = [parameter for parameter in head.parameters() if parameter.ndim < 2 or parameter is head.pool.latent]
    matrices = [parameter for parameter in head.parameters() if all(parameter is not each for each in apart)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": apart, "weight_decay": 0.0}]


def _all_tokens(encoder: Encoder, images: Tensor) -> Tensor:
    return torch.cat(encoder(images), dim=1)
