"""Blocks that are computed twice: the same gradients, with the draws of drop path, for less memory."""

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tasks.blocks import recompute
from tasks.drop_path import drop_path_keys, use_keyed_drop_path
from tasks.encoder_config import EncoderConfig
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tests.tasks.clip_runs import peak_bytes


def encoder(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    settings = {"arch": "vit_tiny", "width": 24, "depth": 6, "heads": 2, "image_size": 32, "patch_size": 4}
    built = Encoder(EncoderConfig(**{**settings, "drop_path": 0.4, **changes})).double().train()
    use_keyed_drop_path(built)
    return built


def gradients(model: Encoder, keys: Tensor) -> dict[str, Tensor]:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with drop_path_keys(model, keys):  # which is over when the backward pass begins
        features = model.features(images)
    features.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_and_memory_is_less() -> None:
    keys = torch.arange(8)
    plain, twice = encoder(), encoder()
    names = list(twice.state_dict())
    recompute(twice.blocks)
    assert list(twice.state_dict()) == names
    found, want = gradients(twice, keys), gradients(plain, keys)
    assert found.keys() == want.keys() and len(want) > 50
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)
    other = gradients(encoder(), keys + 100)
    assert any(not torch.allclose(other[name], gradient) for name, gradient in want.items()), "drop path must matter"
    assert peak_bytes(lambda: gradients(twice, keys)) < 0.6 * peak_bytes(lambda: gradients(plain, keys))


def test_without_gradients_a_block_is_computed_once() -> None:
    calls = []

    class Counted(Block):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)  # type: ignore[no-any-return]

    block = Counted(8, 2)
    recompute([block])
    with torch.no_grad():
        block(torch.randn(1, 3, 8))
    assert len(calls) == 1
    block(torch.randn(1, 3, 8)).sum().backward()
    assert len(calls) == 3


def test_batch_norm_is_refused() -> None:
    with pytest.raises(TaskError, match=r"activation_checkpointing .* BatchNorm would count the batch twice"):
        recompute([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])
