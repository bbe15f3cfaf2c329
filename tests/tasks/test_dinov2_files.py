"""Files of the DINOv2 authors give the features that timm gives from them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from tasks.encoder_files import load_encoder
from tasks.errors import TaskError


def reference(registers: int) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=56, patch_size=14, num_classes=0, embed_dim=24, depth=2, num_heads=2, init_values=1e-5,
        reg_tokens=registers, no_embed_class=registers > 0, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def authors_state(model: VisionTransformer, registers: int) -> dict[str, torch.Tensor]:
    """As their files have it: a place for the class token, a mask token, registers under their name."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["mask_token"] = torch.randn(1, 24)
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 24), state["pos_embed"]], dim=1)
    return state


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("form", ["backbone", "teacher in chunks"])
def test_features_are_those_of_timm(registers: int, form: str, tmp_path: Path) -> None:
    model = reference(registers)
    state = authors_state(model, registers)
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    content: dict[str, object] = dict(state)
    if form != "backbone":
        named = {name.replace("blocks.1.", "blocks.0.1.").replace("blocks.0.norm", "blocks.0.0.norm"): value
                 for name, value in state.items()}  # fmt: skip
        for part in ("attn", "mlp", "ls1", "ls2"):
            named = {name.replace(f"blocks.0.{part}", f"blocks.0.0.{part}"): value for name, value in named.items()}
        heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.mlp.0.weight": torch.zeros(2, 2)}
        content = {"teacher": {f"backbone.{name}": value for name, value in named.items()} | heads}
    torch.save(content, tmp_path / "dinov2.pth")
    encoder = load_encoder(tmp_path / "dinov2.pth", heads=2)
    assert (encoder.config.image_size, encoder.config.patch_size, encoder.config.pool) == (56, 14, "cls")
    assert encoder.config.position_resize == ("open_clip" if registers else "dino")
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        want = model.forward_features(images)
        found = encoder(images)
    torch.testing.assert_close(torch.cat(found, dim=1), want, atol=1e-5, rtol=1e-5)
    smaller = load_encoder(tmp_path / "dinov2.pth", heads=2, image_size=28)
    with torch.no_grad():
        assert smaller(images[:, :, :28, :28]).patches.shape == (2, 4, 24)


def test_the_giant_is_refused_with_a_way_out(tmp_path: Path) -> None:
    state = authors_state(reference(0), 0)
    state["blocks.0.mlp.w12.weight"] = state.pop("blocks.0.mlp.fc1.weight")
    torch.save(state, tmp_path / "giant.pth")
    with pytest.raises(TaskError, match=r"SwiGLU blocks .* use timm:vit_giant"):
        load_encoder(tmp_path / "giant.pth", heads=2)
