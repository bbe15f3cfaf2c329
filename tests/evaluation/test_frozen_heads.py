"""The probes that train small heads on a frozen encoder, in seconds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from datamodules.errors import DataError
from datamodules.labelled_batches import labelled_batches, shuffled
from datamodules.manifest import load_manifest
from datamodules.recipes import MAERecipe
from datamodules.shard_reader import BadSampleError, ShardReader
from evaluation.attentive import Attentive, AttentiveHead, attentive, groups_of
from evaluation.errors import EvaluationError
from evaluation.features import extract
from evaluation.frozen_heads import cosine, frozen, ranks_of_heads, train_heads
from evaluation.image_data import ImageData, parts_of, rows_of
from evaluation.image_probes import score_linear_paper
from evaluation.labels import match_labels
from evaluation.linear_mae import LinearMAE, lars, linear_mae, warmup_cosine
from evaluation.linear_paper import LinearPaper, linear_paper, see
from evaluation.probes import ProbeSettings
from evaluation.ranks import top
from tasks.block_tokens import last_block_tokens
from tasks.encoder_files import load_encoder
from tasks.encoders import Encoder
from tasks.errors import TaskError
from tests.evaluation.conftest import CONFIG, write_images


def data_of(train: Path, test: Path, encoder: Encoder, **more: object) -> ImageData:
    seen, scored = (extract(encoder, root, device="cpu", workers=0, progress=False) for root in (train, test))
    label, classes = match_labels(seen.classes, seen.label, scored.classes, scored.label)
    return ImageData(
        train, rows_of(train, seen.key), seen.key, seen.label, test, rows_of(test, scored.key), scored.key, label,
        len(classes), workers=0, batch_size=48, progress=False, **more,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def world_data(world: Path, cache: Path, encoder_file: Path) -> ImageData:
    return data_of(world / "train", world / "test", load_encoder(encoder_file))


def test_order_is_a_permutation_that_stays_within_windows() -> None:
    counts = np.array([4] * 10)
    rows = np.arange(40)
    order = shuffled(rows, counts, seed=3, epoch=0, window=2)
    assert sorted(order) == list(range(40)) and order.tolist() != list(range(40))
    for start in range(0, 40, 8):
        assert len(set(order[start : start + 8] // 4)) == 2, "two shards are read together"
    assert np.array_equal(order, shuffled(rows, counts, seed=3, epoch=0, window=2))
    assert not np.array_equal(order, shuffled(rows, counts, seed=3, epoch=1, window=2))
    some = np.array([1, 5, 17, 33])
    assert sorted(shuffled(some, counts, seed=0, epoch=0)) == some.tolist()


def test_batches_are_of_the_rows_with_their_labels_and_repeat(world: Path) -> None:
    def take(workers: int) -> list[dict[str, torch.Tensor]]:
        return list(labelled_batches(
            world / "train", MAERecipe(16), rows=np.arange(0, 240, 6), batch_size=20, steps=3, seed=1, workers=workers
        ))  # fmt: skip

    first, second = take(0), take(1)
    assert [batch["label"].tolist() for batch in first] == [[0] * 20] * 3, "every sixth image is of the first class"
    assert first[0]["image"].shape == (20, 3, 16, 16)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one["image"], two["image"])
    assert not torch.equal(first[0]["image"], first[2]["image"]), "another epoch, other crops"
    with pytest.raises(DataError, match="a batch of 41 images"):
        next(labelled_batches(world / "train", MAERecipe(16), rows=np.arange(40), batch_size=41, steps=1, seed=0))


def test_rows_are_found_when_some_images_are_bad(tmp_path: Path, cache: Path, encoder_file: Path) -> None:
    root = write_images(tmp_path / "data", 90, bad=3)
    found = extract(load_encoder(encoder_file), root, device="cpu", workers=0, progress=False)
    assert np.array_equal(rows_of(root, found.key), np.arange(3, 90))
    assert load_manifest(root).num_samples == 90


@pytest.mark.parametrize(
    ("batch_size", "most", "found"),
    [(1024, 256, (1024, 256)), (9973, 256, (9728, 256)), (1000, 256, (1000, 250)), (7, 256, (6, 6)), (1, 8, (1, 1)),
     (2, 1, (2, 2)), (48, 48, (48, 48)), (134, 64, (128, 64))],
)  # fmt: skip
def test_batches_are_cut_into_parts_of_a_useful_size(batch_size: int, most: int, found: tuple[int, int]) -> None:
    assert parts_of(batch_size, most) == found


def test_tokens_of_lower_blocks_are_those_that_the_blocks_give() -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(CONFIG, depth=3)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = last_block_tokens(encoder, images, 2)
        whole = encoder(images)
        encoder.trunk.blocks = encoder.trunk.blocks[:2]
        lower = encoder(images)
    assert len(tokens) == 2
    assert torch.equal(tokens[1].prefix, whole.prefix) and torch.equal(tokens[1].patches, whole.patches)
    assert torch.equal(tokens[0].prefix, lower.prefix) and torch.equal(tokens[0].patches, lower.patches)
    with pytest.raises(TaskError, match="does not have 3 blocks"):
        last_block_tokens(encoder, images, 3)


def test_heads_see_the_last_class_tokens_and_the_mean_of_the_last_patches() -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(CONFIG, depth=3)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        one, both, meant = see(encoder, [(1, False), (2, False), (1, True)], images)
        lower, last = last_block_tokens(encoder, images, 2)
    assert torch.equal(one, last.prefix[:, 0])
    assert torch.equal(both, torch.cat([lower.prefix[:, 0], last.prefix[:, 0]], dim=1))
    assert torch.equal(meant, torch.cat([last.prefix[:, 0], last.patches.mean(1)], dim=1))


def test_rates_rise_and_fall() -> None:
    factor = warmup_cosine(0.1)
    assert [factor(0.0), factor(0.05), factor(0.1), factor(1.0)] == pytest.approx([0, 0.5, 1, 0])
    assert [cosine(0), cosine(0.5), cosine(1)] == pytest.approx([1, 0.5, 0])
    assert warmup_cosine(0)(0.0) == 1


def test_the_sweep_chooses_on_train_alone_and_repeats(world_data: ImageData, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    config = LinearPaper(rates=(1e-5, 1.0), steps=30, batch_size=48)
    found = linear_paper(encoder, world_data, config)
    assert len(found.held_out) == 2 * 2, "blocks 1 and 4 are the same with one block"
    assert found.chosen_on == 24 and found.best == max(found.held_out, key=lambda name: found.held_out[name])
    assert found.best.endswith("rate 1") and top(found.rank) > 60
    again = linear_paper(encoder, world_data, config)
    assert np.array_equal(found.rank, again.rank) and found.held_out == again.held_out
    # With other test labels nothing else is chosen.
    blind = replace(world_data, test_label=np.roll(world_data.test_label, 1))
    assert linear_paper(encoder, blind, config).best == found.best


def test_the_sweep_sees_the_mean_alone_without_a_class_token(world: Path, cache: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(CONFIG, class_token=False)).eval()
    config = LinearPaper(rates=(1.0,), steps=2, batch_size=48)
    found = linear_paper(encoder, data_of(world / "train", world / "test", encoder), config)
    assert list(found.held_out) == ["mean patch, rate 1"]


def test_the_linear_probe_of_mae_learns_with_a_batch_in_parts(world_data: ImageData, encoder_file: Path) -> None:
    config = LinearMAE(epochs=40, warmup_epochs=4, base_rate=8.0, batch_size=96)
    found = linear_mae(load_encoder(encoder_file), world_data, config)
    assert (found.steps, found.batch_size) == (80, 96)
    assert top(found.rank) > 60
    with pytest.raises(EvaluationError, match="fewer warmup_epochs"):
        linear_mae(load_encoder(encoder_file), world_data, LinearMAE(epochs=5))


def test_lars_scales_the_matrix_by_its_length_and_the_bias_not() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 3)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    optimizer = lars(linear, 2.0)
    linear(torch.randn(4, 5)).square().sum().backward()
    assert linear.weight.grad is not None and linear.bias.grad is not None
    optimizer.step()
    trust = 0.001 * weight.norm() / linear.weight.grad.norm()
    torch.testing.assert_close(linear.weight.detach(), weight - 2.0 * trust * linear.weight.grad)
    torch.testing.assert_close(linear.bias.detach(), bias - 2.0 * linear.bias.grad)


def test_the_attentive_probe_learns_and_the_encoder_stays(world_data: ImageData, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = attentive(encoder, world_data, Attentive(rates=(1e-6, 1e-2), epochs=8, batch_size=54, head_width=8))
    assert found.best == "rate 0.01" and found.steps == 32
    assert top(found.rank) > 60
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_the_attentive_head_depends_on_every_token_but_not_on_their_order() -> None:
    torch.manual_seed(0)
    head = AttentiveHead(24, 6, head_width=10)
    tokens = torch.randn(2, 9, 24)
    with torch.no_grad():
        torch.testing.assert_close(head(tokens), head(tokens[:, torch.randperm(9)]))
        changed = tokens.clone()
        changed[:, 4] = torch.randn(24)
        assert not torch.allclose(head(tokens), head(changed))


def test_settings_that_cannot_be_trained_are_one_line(world_data: ImageData, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    for probe, config in ((linear_paper, LinearPaper(rates=())), (linear_paper, LinearPaper(held_out=0.0)),
                          (attentive, Attentive(rates=(0.0,))), (attentive, Attentive(warmup=1.0))):  # fmt: skip
        with pytest.raises(EvaluationError, match="needs rates"):
            probe(encoder, world_data, config)  # type: ignore[operator]
    alone = replace(world_data, train_rows=world_data.train_rows[:6], train_label=world_data.train_label[:6])
    with pytest.raises(EvaluationError, match="two images of one"):
        linear_paper(encoder, alone, LinearPaper())


def test_heads_that_diverge_are_left_out_as_soon_as_seen(
    world_data: ImageData, encoder_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load_encoder(encoder_file)
    loud = replace(world_data, progress=True)
    found = linear_paper(encoder, loud, LinearPaper(rates=(1e-2, 1e38), blocks=(1,), steps=12, batch_size=48))
    wild = ["1 class tokens, rate 1e+38", "1 class tokens + mean patch, rate 1e+38"]
    assert sorted(found.diverged) == sorted(wild) and len(found.held_out) == 2
    assert found.best in found.held_out and found.best.endswith("rate 0.01")
    assert "linear_paper: 2 of 4 heads left out: loss not finite (step 11)" in capsys.readouterr().err
    with pytest.raises(EvaluationError, match="not finite with any head: lower the rates"):
        linear_paper(encoder, world_data, LinearPaper(rates=(1e38,), steps=6, batch_size=48))


def test_a_head_that_diverges_leaves_the_others_as_they_would_be(world_data: ImageData, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    few = LinearPaper(rates=(1e-2,), blocks=(1,), steps=4, batch_size=48)
    alone = linear_paper(encoder, world_data, few)
    for steps in (2, 4):  # also when it is seen at the last one
        beside = linear_paper(encoder, world_data, replace(few, rates=(1e-2, 1e38), steps=steps))
        assert len(beside.diverged) == 2 and beside.held_out.keys() == alone.held_out.keys()
    first = "1 class tokens, rate 0.01"  # drawn before any other
    assert beside.held_out[first] == alone.held_out[first]


def test_parts_of_a_batch_teach_what_the_whole_does(world_data: ImageData, encoder_file: Path) -> None:
    encoder = load_encoder(encoder_file)
    tokens = frozen(encoder.features, world_data)
    weights, sizes = [], []
    for in_parts in (False, True):
        torch.manual_seed(0)
        head = nn.Linear(24, 6)
        head.register_forward_hook(lambda _, seen, __: sizes.append(len(seen[0])))
        train_heads(
            encoder, tokens, {"one": head}, torch.optim.SGD(head.parameters(), lr=0.1), cosine,
            replace(world_data, batch_size=16), world_data.train_rows, batch_size=96, steps=3, seed=0, name="x",
            in_parts=in_parts,
        )  # fmt: skip
        weights.append(head.weight.detach().clone())
    assert sizes == [96] * 3 + [16] * 18, "memory is that of a part"
    torch.testing.assert_close(*weights)


def test_the_query_the_norms_and_the_biases_do_not_decay() -> None:
    head = AttentiveHead(24, 6, head_width=8)
    decayed, kept = groups_of(head, 0.05)
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0)
    told = {names[id(parameter)] for parameter in decayed["params"]}
    assert told == {f"{each}.weight" for each in
                    ("pool.q", "pool.kv", "pool.proj", "pool.mlp.fc1", "pool.mlp.fc2", "linear")}  # fmt: skip
    assert told | {names[id(parameter)] for parameter in kept["params"]} == set(names.values())


def test_heads_with_infinite_scores_are_last(world_data: ImageData, encoder_file: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 6), torch.nan)

    encoder = load_encoder(encoder_file)
    ranks = ranks_of_heads(encoder, frozen(encoder.features, world_data), {"broken": Broken()}, world_data, "test")
    assert (ranks["broken"] == 6).all()


def test_images_that_cannot_be_read_any_more_end_no_probe(
    world_data: ImageData, encoder_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, whole = load_encoder(encoder_file), ShardReader.image

    def read(reader: ShardReader, shard: int, sample: int) -> tuple[str, torch.Tensor]:
        if sample % 5 == 0:
            raise BadSampleError(reader.name(shard), f"{sample}", "cannot be read: Input/output error", passing=True)
        return whole(reader, shard, sample)

    monkeypatch.setattr(ShardReader, "image", read)
    settings = ProbeSettings(linear_paper=LinearPaper(rates=(1.0,), blocks=(1,), steps=30, batch_size=48))
    found = score_linear_paper(encoder, world_data, settings)
    assert found["top1"] > 60 and found["protocol"]["images_not_read"] == 12
    assert "heads_left_out" not in found["protocol"] or found["protocol"]["heads_left_out"] is None
    monkeypatch.setattr("evaluation.frozen_heads.evaluation_loader", lambda *_, **__: Nothing())
    with pytest.raises(EvaluationError, match=r"x: no image of .* can be read now: see trivit shards verify"):
        ranks_of_heads(encoder, frozen(encoder.features, world_data), {"one": nn.Linear(24, 6)}, world_data, "x")


class Nothing:
    """A loader of which nothing can be read."""

    num_images = 60

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(())


def test_a_batch_that_came_short_is_averaged_over_what_came(
    world_data: ImageData, encoder_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(encoder_file)
    short = {"image": torch.full((12, 3, 16, 16), 99, dtype=torch.uint8), "label": torch.arange(12) % 6}
    gradients = []
    for times in (1, 4):
        batch = {name: torch.cat([value] * times) for name, value in short.items()}
        monkeypatch.setattr("evaluation.frozen_heads.labelled_batches", lambda *_, batch=batch, **__: iter([batch]))
        torch.manual_seed(0)
        head = nn.Linear(24, 6)
        train_heads(
            encoder, frozen(encoder.features, world_data), {"one": head}, torch.optim.SGD(head.parameters(), lr=0.1),
            cosine, world_data, world_data.train_rows, batch_size=48, steps=1, seed=0, name="x",
        )  # fmt: skip
        assert head.bias.grad is not None
        gradients.append(head.bias.grad)
    torch.testing.assert_close(*gradients)


def test_short_parts_count_by_their_images_and_the_batch_by_what_came(
    world_data: ImageData, encoder_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 16, 5 and 3 images of a batch of 48 teach what one of 24 does."""
    encoder = load_encoder(encoder_file)
    images = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    label, gradients = torch.arange(24) % 6, []
    for in_parts, sizes in ((False, [24]), (True, [16, 5, 3])):
        pieces = zip(images.split(sizes), label.split(sizes), strict=True)
        given = iter([{"image": image, "label": number} for image, number in pieces])
        monkeypatch.setattr("evaluation.frozen_heads.labelled_batches", lambda *_, given=given, **__: given)
        torch.manual_seed(0)
        head = nn.Linear(24, 6)
        train_heads(
            encoder, frozen(encoder.features, world_data), {"one": head}, torch.optim.SGD(head.parameters(), lr=0.1),
            cosine, replace(world_data, batch_size=48 // len(sizes)), world_data.train_rows, batch_size=48, steps=1,
            seed=0, name="x", in_parts=in_parts,
        )  # fmt: skip
        assert head.weight.grad is not None
        gradients.append(head.weight.grad)
    torch.testing.assert_close(*gradients)
