"""CLIPTask in a Trainer: big batches, exact resume, starting points, locked towers, captions, groups, rates."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from tasks import load_encoder
from tasks.clip_files import load_clip
from tasks.clip_task import CLIPTask
from tasks.encoder_config import EncoderConfig
from tasks.encoder_files import save_encoder
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tasks.tokenizer import train_bpe
from tests.tasks.clip_runs import TEXT, TINY, Pairs, fit, pairs, peak_bytes, tiny_task
from tests.tasks.dino_runs import Stop, same, state

HEALTH = {
    "loss", "alignment", "uniformity", "modality_gap", "positive_similarity", "hardest_negative", "logit_scale",
    "effective_batch", "caption_cut", "caption_distinct",
}  # fmt: skip


class Outputs(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append({k: v.clone() for k, v in outputs.items()})


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_micro_batches_change_nothing(loss: Any) -> None:
    """Every negative is kept, and drop path and patch dropping follow from the samples."""
    runs = []
    for micro_batch in (8, 2):
        task, out = tiny_task(loss=loss, patch_drop=0.5).double(), Outputs()
        fit(task, 3, Pairs(8, micro_batch), callbacks=[out], precision="64-true")
        runs.append((state(task), out.seen))
    (whole, seen), (parts, seen_of_parts) = runs
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-9)
    assert set(seen[0]) == HEALTH | ({"logit_bias"} if loss == "sigmoid" else set())
    for a, b in zip(seen, seen_of_parts, strict=True):
        assert a["effective_batch"] == b["effective_batch"] == 8
        torch.testing.assert_close(a["loss"], b["loss"])


def test_micro_batches_need_less_memory() -> None:
    task, batch = tiny_task(), pairs(64)
    peaks = [
        peak_bytes(lambda m=m: task.model.contrast(*task.model(*batch, m)).backward())  # type: ignore[misc]
        for m in (64, 4)
    ]
    assert peaks[1] < peaks[0] / 3


def test_other_random_layers_repeat_their_draws_too() -> None:
    """What timm models draw from torch's generator is the same when a micro-batch is seen for the second time."""
    task = tiny_task().double()
    for block in task.model.encoder.blocks:
        block.mlp.drop1.p = 0.5  # type: ignore[union-attr]
    batch, gradients = pairs(8, dtype=torch.float64), []
    for recompute in (True, False):
        torch.manual_seed(3)
        if recompute:
            vectors = task.model(*batch, 2)
        else:
            parts = zip(*(torch.split(given, 2) for given in batch), strict=True)  # type: ignore[no-untyped-call]
            vectors = tuple(torch.cat(v) for v in zip(*(task.model(*part) for part in parts), strict=True))
        task.zero_grad()
        task.model.contrast(*vectors).backward()
        gradients.append({n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_resume_is_exact(stop_at: int, tmp_path: Path) -> None:
    def task(**changes: Any) -> CLIPTask:
        return tiny_task(patch_drop=0.25, loss="sigmoid", warmup_steps=2, **changes)

    whole, parts, seen, seen_parts = task(), task(), Outputs(), Outputs()
    fit(whole, 4, Pairs(8, 4), callbacks=[seen])
    fit(parts, 4, Pairs(8, 4), callbacks=[seen_parts, Stop(stop_at, tmp_path / "last.ckpt")])
    torch.manual_seed(9)
    resumed = task(init_encoder="gone/since.ckpt")  # what a run started from is not needed to go on
    fit(resumed, 4, Pairs(8, 4), callbacks=[seen_parts], ckpt_path=tmp_path / "last.ckpt")
    assert same(state(whole), state(resumed))
    assert all(same(a, b) for a, b in zip(seen.seen, seen_parts.seen, strict=True))


@pytest.mark.parametrize(
    ("encoder", "changes"),
    [
        (EncoderConfig(arch="timm:test_vit", image_size=32, pool="mean", drop_path=0.2), {"patch_drop": 0.5}),
        (EncoderConfig(arch="timm:test_convnext", image_size=32, drop_path=0.2), {}),
        (replace(TINY, class_token=False, pool="mean", positions="sincos2d", pre_norm=False), {}),
        (replace(TINY, registers=2, pool="cls+mean", layer_scale=0.1), {"patch_drop": 0.5}),
        (replace(TINY, width=24, pool="mean"), {"image_head": "map", "joint_width": 24, "loss": "sigmoid"}),
        (TINY, {"text": replace(TEXT, causal=False, pool="last", projection_bias=True)}),
    ],
    ids=["timm ViT", "ConvNeXt", "no class token", "registers", "attention pooling", "bidirectional text"],
)
def test_every_tower_trains_saves_and_loads(encoder: EncoderConfig, changes: dict[str, Any], tmp_path: Path) -> None:
    task = tiny_task(encoder, **changes)
    before, out = state(task.model), Outputs()
    trainer = fit(task, 3, Pairs(4, 2, size=encoder.image_size), callbacks=[out])
    assert all(value.isfinite() for row in out.seen for value in row.values())
    still = [name for name, p in task.model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert not still
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    clip = load_clip(tmp_path / "run.ckpt")
    assert same(state(clip), state(task.model)) and not clip.training
    images, ids, _ = pairs(2, size=encoder.image_size)
    task.model.eval()
    assert torch.equal(clip.encode_image(images), task.model.encode_image(images))
    assert torch.equal(clip.encode_text(ids), task.model.encode_text(ids))
    assert torch.equal(load_encoder(tmp_path / "run.ckpt").features(images), task.model.encoder.features(images))


def test_start_from_an_encoder_and_lock_it(tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = Encoder(replace(TINY, image_size=32))
    save_encoder(other, tmp_path / "old.safetensors")
    encoder = replace(TINY, drop_path=0.9)
    task = tiny_task(encoder, init_encoder=str(tmp_path / "old.safetensors"), lock_image=True)
    before = state(task.model)
    fit(task, 2, callbacks=[out := Outputs()])
    inside = load_encoder(tmp_path / "old.safetensors", image_size=16)
    assert same(state(task.model.encoder.trunk), state(inside.trunk))
    assert not torch.equal(task.model.image_head.weight, before["image_head.weight"])  # type: ignore[arg-type]
    assert len(out.seen) == 2 and not task.model.encoder.training
    free = tiny_task(init_encoder=str(tmp_path / "old.safetensors"))
    fit(free, 2)
    assert not same(state(free.model.encoder.trunk), state(inside.trunk))
    with pytest.raises(TaskError, match="lock_image would lock random weights"):
        tiny_task(lock_image=True)


def test_start_from_a_whole_clip(tmp_path: Path) -> None:
    old = tiny_task()
    fit(old, 2, callbacks=[Stop(1, tmp_path / "old.ckpt")])
    task = tiny_task(init_checkpoint=str(tmp_path / "old.ckpt"), lr=0.0)
    fit(task, 1)
    assert same(state(task.model), state(old.model))
    with pytest.raises(TaskError, match="does not fit"):
        fit(tiny_task(joint_width=6, init_checkpoint=str(tmp_path / "old.ckpt")), 1)


def test_temperature_is_clamped_and_does_not_decay() -> None:
    task = tiny_task(lr=100.0, max_logit_scale=20.0, weight_decay=0.3)
    fit(task, 2, callbacks=[out := Outputs()])
    assert 1 <= task.model.logit_scale.exp() <= 20.0001
    assert out.seen[0]["logit_scale"] == pytest.approx(1 / 0.07)
    names = {id(p): name for name, p in task.model.named_parameters()}
    plain, decayed = task.configure_optimizers().param_groups
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.3)
    without = {names[id(p)] for p in plain["params"]}
    assert {"logit_scale", "encoder.trunk.cls_token", "encoder.trunk.norm.weight"} <= without
    assert all(name in without for name in names.values() if name.endswith("bias"))
    with_decay = {names[id(p)] for p in decayed["params"]}
    assert {"encoder.trunk.pos_embed", "text.trunk.token_embedding.weight", "image_head.weight"} <= with_decay
    assert "text.trunk.positional_embedding" in with_decay and not without & with_decay
    sigmoid = tiny_task(loss="sigmoid").configure_optimizers().param_groups[0]["params"]
    assert sum(p.ndim == 0 for p in sigmoid) == 2


def test_learning_rate_is_open_clips() -> None:
    task = tiny_task(lr=1.0, warmup_steps=4)
    rates = [task.learning_rate(step, 12, 100, 8) for step in range(12)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.5) and 0 < rates[11] < 0.05
    with pytest.raises(TaskError, match="warm-up of 4 steps"):
        task.check_schedule(4, 100)


def test_captions_are_counted_and_cut(tmp_path: Path) -> None:
    task = tiny_task(text=replace(TEXT, vocab_size=None))
    tokenize = pickle.loads(pickle.dumps(task.tokenize))
    long, just = "one two three four five six seven", "one two three four five six"
    ids = tokenize(["", "   ", "a cat", "a cat", long, just])
    assert ids.shape == (6, 9)
    batch = task.on_before_batch_transfer({"text": ids, "image": None}, 0)
    counts = batch["captions"]
    assert counts["caption_cut"] == pytest.approx(1 / 6)
    assert counts["caption_distinct"] == pytest.approx(3 / 6)  # the long one reads like the other once it is cut
    assert torch.equal(batch["text"], task.model.text.tokenizer(["", "   ", "a cat", "a cat", long, just]))
    short = task.on_before_batch_transfer({"text": task.tokenize(["a"]), "image": None}, 0)["text"]
    assert short.shape == (1, 8)
    wide = tiny_task(text=replace(TEXT, vocab_size=None, context_length=32))
    assert wide.on_before_batch_transfer({"text": wide.tokenize(["a cat"]), "image": None}, 0)["text"].shape == (1, 8)
    last = tiny_task(text=replace(TEXT, vocab_size=None, context_length=32, causal=False, pool="last"))
    assert last.on_before_batch_transfer({"text": last.tokenize(["a cat"]), "image": None}, 0)["text"].shape == (1, 32)


def test_a_vocabulary_that_is_larger_than_the_tower() -> None:
    task = tiny_task()
    with pytest.raises(TaskError, match=r"text\.vocab_size 50 has no place for id 49407 of tokenizer clip"):
        task.on_before_batch_transfer({"text": task.tokenize(["a cat"])}, 0)


def test_a_vocabulary_travels_and_is_not_exchanged(tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    train_bpe(["a red circle", "two blue squares"] * 9, words, vocab_size=300)
    text = replace(TEXT, tokenizer=str(words), vocab_size=None)
    fit(tiny_task(text=text), 2, callbacks=[Stop(1, tmp_path / "last.ckpt")])
    tokenizer = load_clip(tmp_path / "last.ckpt").text.tokenizer
    ids = tokenizer(["a red square"])
    train_bpe(["other words"], words, vocab_size=280)
    assert torch.equal(tokenizer(["a red square"]), ids)
    words.unlink()
    assert torch.equal(load_clip(tmp_path / "last.ckpt").text.tokenizer(["a red square"]), ids)
    train_bpe(["other words in the file of the same name"], tmp_path / "others.json", vocab_size=300)
    other = tiny_task(text=replace(text, tokenizer=str(tmp_path / "others.json"), vocab_size=300))
    with pytest.raises(TaskError, match="no longer what this run began with"):
        fit(other, 2, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joint_width": 0}, "joint_width 0"),
        ({"patch_drop": 1.0}, "patch_drop 1.0 must leave"),
        ({"image_head": "map"}, "needs a plain ViT that is joint_width 12 wide"),
        ({"init_encoder": "a", "init_checkpoint": "b"}, "not both"),
        ({"max_logit_scale": 0.5}, "max_logit_scale"),
        ({"text": replace(TEXT, heads=3)}, "3 heads do not divide text width 16"),
        ({"text": replace(TEXT, context_length=2)}, "no room"),
        ({"text": replace(TEXT, tokenizer="no/such.json", vocab_size=None)}, "no tokenizer no/such.json"),
        (
            {"encoder": EncoderConfig(arch="timm:test_convnext", image_size=32), "patch_drop": 0.5},
            "cannot: take a plain",
        ),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tiny_task(**changes)


def test_what_a_run_contradicts() -> None:
    with pytest.raises(TaskError, match=r"data\.device_batch_size"):
        fit(tiny_task(), 2, accumulate_grad_batches=2)
    with pytest.raises(TaskError, match="at least 2"):
        fit(tiny_task(), 2, Pairs(1))


def test_batch_norm_is_not_cut_into_micro_batches() -> None:
    """It would see a part of the batch, and see it again when that part is computed anew."""
    resnet = EncoderConfig(arch="timm:test_resnet", image_size=32, pool="mean")
    with pytest.raises(TaskError, match="BatchNorm would see the 4 pairs of a micro-batch"):
        fit(tiny_task(resnet), 1, Pairs(8, 4, size=32))
    fit(tiny_task(resnet), 1, Pairs(8, 8, size=32))


def test_a_vocabulary_whose_end_is_not_its_largest_id(tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    train_bpe(["a red circle", "two blue squares"] * 9, words, vocab_size=300)
    content = json.loads(words.read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 300, "content": "<later>"})
    words.write_text(json.dumps(content))
    with pytest.raises(TaskError, match=r"words\.json the end is id \d+ of \d+: learn a vocabulary"):
        fit(tiny_task(text=replace(TEXT, tokenizer=str(words), vocab_size=None)), 1)
