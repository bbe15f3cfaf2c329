"""CLIP against open_clip's recorded numbers: model, loss, gradients, token ids, classifiers, through CLIPTask."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.clip_loss import CLIPLoss
from tasks.clip_task import CLIPTask
from tasks.encoder_config import EncoderConfig
from tasks.open_clip_names import our_names
from tasks.siglip_loss import SigLIPLoss
from tasks.text_tower import TextConfig, trim
from tasks.zero_shot import class_weights, zero_shot_logits
from tests.conftest import GOLDEN, Golden


def golden_task(c: dict[str, Any], **changes: Any) -> CLIPTask:
    """The task that a YAML with the fixture's numbers builds, in float64."""
    vision, text = c["vision"], c["text"]
    activation = "quick_gelu" if c["quick_gelu"] else "gelu"
    encoder = EncoderConfig(
        arch="vit_base",
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["width"],
        depth=vision["layers"],
        heads=vision["width"] // vision["head_width"],
        mlp_ratio=vision["mlp_ratio"],
        positions="learned",
        position_resize="open_clip",
        pre_norm=True,
        norm_eps=c["layer_norm_eps"],
        activation=activation,
        pool="cls",
    )
    tower = TextConfig(
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        width=text["width"],
        depth=text["layers"],
        heads=text["heads"],
        norm_eps=c["layer_norm_eps"],
        activation=activation,
    )
    loss = "softmax" if c["init_logit_bias"] is None else "sigmoid"
    return CLIPTask(encoder, tower, c["embed_dim"], loss=loss, lr=1e-3, **changes).double()


def load(task: CLIPTask, golden: Golden) -> None:
    task.model.load_state_dict(our_names(golden.group("state.")))


def off(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours.double() - theirs).abs().max().item()


@pytest.mark.golden("clip_model")
@pytest.mark.parametrize("trimmed", [False, True], ids=["whole texts", "trimmed texts"])
def test_model_loss_and_gradients(golden: Golden, trimmed: bool) -> None:
    task, given, out = golden_task(golden.config), golden.group("in."), golden.group("out.")
    load(task, golden)
    model, ids = task.model, given["tokens"]
    ids = trim(ids) if trimmed else ids
    image, text = model(given["images"], ids, torch.arange(len(ids)))
    assert off(image, out["image_features"]) < 1e-9
    assert off(text, out["text_features"]) < 1e-9
    pooled = model.encoder.features(given["images"])
    assert off(model.image_head(pooled), out["image_features_unnormalized"]) < 1e-9
    assert off(model.text(ids), out["text_features_unnormalized"]) < 1e-9
    assert off(model.logit_scale.exp(), out["logit_scale_exp"]) < 1e-9
    assert off(model.logit_scale.exp() * image @ text.T, out["logits_per_image"]) < 1e-8
    loss = model.contrast(image, text)
    assert off(loss, out["clip_loss"]) < 1e-9
    loss.backward()
    gradients = our_names(golden.group("grad."))
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients.items():
        found = model.get_parameter(name).grad
        assert found is not None and off(found, gradient) < 1e-9, name


@pytest.mark.golden("clip_dist_loss")
def test_losses_of_one_process(golden: Golden) -> None:
    """The whole batch in one process; `test_clip_ranks.py` shares it among ranks."""
    c = golden.config
    sizes = sorted({name.split(".")[0] for name in golden.group("in.")})
    assert sizes
    for ws in sizes:
        ranks = range(int(ws[2:]))
        image, text = (
            torch.cat([golden.group(f"in.{ws}.rank{r}.")[f"{who}_features"] for r in ranks]).requires_grad_()
            for who in ("image", "text")
        )
        for kind in ("clip", "siglip"):
            values = [c["scale"]] if kind == "clip" else [c["siglip_scale"], c["siglip_bias"]]
            scalars = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
            loss = (CLIPLoss() if kind == "clip" else SigLIPLoss())(image, text, *scalars)
            found = torch.autograd.grad(loss, [image, text, *scalars])
            want = golden.group(f"out.{kind}.{ws}.single_process.")
            assert off(loss, want["loss"]) < 1e-9
            names = ["grad_image_features", "grad_text_features", "grad_scale", "grad_bias"]
            for name, gradient in zip(names, found, strict=False):
                assert off(gradient, want[name].reshape(gradient.shape)) < 1e-9, (kind, name)


@pytest.mark.golden("clip_tokenizer")
def test_token_ids(golden: Golden) -> None:
    """Whole and short contexts; in training the task cuts what its own `tokenize` made one id longer."""
    rows, short = golden.values["rows"], golden.values["short_context"]
    encoder = EncoderConfig(arch="vit_tiny", image_size=16, patch_size=8, width=8, depth=1, heads=1)
    texts = [row["text"] for row in rows]
    cases = [(golden.config["context_length"], texts, [row["ids"] for row in rows])]
    cases.append((short["context_length"], short.get("texts", texts[: len(short["ids"])]), short["ids"]))
    for length, given, ids in cases:
        tower = TextConfig(context_length=length, width=8, depth=1, heads=1)
        task = CLIPTask(encoder, tower, 8, lr=1e-3)
        tokenizer = task.model.text.tokenizer
        assert tokenizer(given).tolist() == ids
        assert tokenizer.vocab_size == golden.config["vocab_size"] and tokenizer.end_id == golden.config["eot"]
        cut, _ = task._cut(task.tokenize(given))
        assert cut.tolist() == ids
    lengths = [row["untruncated_length"] for row in rows]
    task = CLIPTask(encoder, TextConfig(width=8, depth=1, heads=1), 8, lr=1e-3)
    for text, length in zip(texts, lengths, strict=True):
        _, counts = task._cut(task.tokenize([text]))
        assert counts["caption_cut"] == (length > golden.config["context_length"]), text


@pytest.mark.golden("clip_zero_shot")
def test_zero_shot_classifier(golden: Golden) -> None:
    model_of = Golden(GOLDEN / golden.config["model"].replace(".safetensors", ".json"))
    task, given, out = golden_task(model_of.config), golden.group("in."), golden.group("out.")
    load(task, model_of)
    prompts = task.model.encode_text(given["tokens"])
    assert off(prompts, out["prompt_features"]) < 1e-9
    classes = torch.arange(len(golden.config["classnames"])).repeat_interleave(len(golden.config["templates"]))
    weights = class_weights(prompts, classes)
    assert off(weights.T, out["classifier"]) < 1e-9
    images = task.model.encode_image(given["images"])
    assert off(images, out["image_features"]) < 1e-9
    assert off(zero_shot_logits(images, weights), out["logits"]) < 1e-7
