import json

import numpy as np
import pytest
import torch

from datamodules.errors import DataError
from datamodules.manifest import load_manifest
from datamodules.order import Order
from datamodules.recipes import CLIPRecipe
from datamodules.sample_captions import CaptionConfig, SampleCaptions
from datamodules.shard_reader import BadSampleError, ShardReader
from datamodules.shard_writer import ShardWriter
from datamodules.stream import TrainStream
from tests.datamodules.pictures import jpeg


def shards(folder, samples, classes=()):
    with ShardWriter(folder, samples_per_shard=5, classes=list(classes)) as writer:
        for i, members in enumerate(samples):
            writer.write(f"{i:04d}", {"jpg": jpeg(i), **members})
    return load_manifest(folder)


def captions(manifest, sample=0, **config):
    return SampleCaptions(ShardReader(manifest), CaptionConfig(**config)).all(0, sample)


def test_from_text_and_json(tmp_path):
    many = {"captions": ["one", " two\nlines "], "alt": "third", "n": 5, "list": ["x", 3]}
    manifest = shards(tmp_path, [
        {"txt": "\ufeffa  cat\n".encode()},
        {"json": json.dumps(many).encode()},
        {"json": b'{"caption": "alone"}'},
        {"txt": b"text wins", "json": b'{"caption": "alone"}'},
    ])  # fmt: skip
    assert captions(manifest, 0) == ["a cat"]
    assert captions(manifest, 1) == ["one", "two lines"]
    assert captions(manifest, 1, field="alt") == ["third"]
    assert captions(manifest, 2) == ["alone"]
    assert captions(manifest, 3) == ["text wins"]
    assert captions(manifest, 3, field="caption") == ["alone"]
    for field in ("n", "list"):
        with pytest.raises(BadSampleError, match="must be a text or a list"):
            captions(manifest, 1, field=field)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "no caption"),
        ({"txt": b""}, "no caption"),
        ({"txt": b" \n\t"}, "no caption"),
        ({"txt": b"caf\xe9"}, "txt: not UTF-8 .byte 3."),
        ({"json": b"{"}, "json: "),
        ({"json": b"[1]"}, "no caption"),
        ({"json": b'{"caption": null}'}, "must be a text"),
        ({"json": b"[" * 100_000}, "json: "),
        ({"json": b'{"caption": "\xff"}'}, "json: not UTF-8"),
    ],
)
def test_bad_captions(tmp_path, members, reason):
    with pytest.raises(BadSampleError, match=reason):
        captions(shards(tmp_path, [members, {"txt": b"another"}]))


def test_from_classes(tmp_path):
    manifest = shards(tmp_path / "s", [{"cls": b"1"}, {"cls": b"0"}, {}], ["n01", "sea_lion"])
    templates = ("a photo of a {}.", "{}")
    assert captions(manifest, 0, templates=templates) == ["a photo of a sea lion.", "sea lion"]
    (tmp_path / "names.tsv").write_text("wnid\tnames\nn01\tcat, kitten\nsea_lion\tseal\n")
    names = str(tmp_path / "names.tsv")
    expected = ["a photo of a cat.", "a photo of a kitten.", "cat", "kitten"]
    assert captions(manifest, 1, templates=templates, class_names=names) == expected
    with pytest.raises(BadSampleError, match="no label"):
        captions(manifest, 2, templates=templates)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"templates": ("a photo",)}, "must have exactly one {}"),
        ({"templates": ("{} {}",)}, "must have exactly one {}"),
        ({"class_names": "x.tsv"}, "needs captions.templates"),
        ({"field": "alt", "templates": ("{}",)}, "give one of them"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(DataError, match=message):
        CLIPRecipe(captions=CaptionConfig(**config))


def test_templates_need_classes(tmp_path):
    with pytest.raises(DataError, match="has no class names"):
        captions(shards(tmp_path, [{"cls": b"0"}]), templates=("{}",))


def stream(manifest, tokenize=None, **layout):
    order = Order(manifest.counts, seed=1, global_batch_size=8)
    return TrainStream(order, ShardReader(manifest), CLIPRecipe(crop_size=16), tokenize=tokenize, **layout)


def lengths(texts):
    return torch.tensor([[len(text)] for text in texts])


@pytest.fixture
def pairs(tmp_path):
    texts = [{"captions": [f"{i} is {word}" for word in ("red", "round", "old")]} for i in range(40)]
    return shards(tmp_path, [{"json": json.dumps(text).encode()} for text in texts])


def test_a_batch_has_the_captions_of_its_images(pairs):
    batch = stream(pairs, lengths)[0]
    assert batch["image"].shape == (8, 3, 16, 16)
    assert [int(caption.split()[0]) for caption in batch["caption"]] == [int(key[-4:]) for key in batch["key"]]
    assert batch["text"].tolist() == [[len(caption)] for caption in batch["caption"]]
    assert "text" not in stream(pairs)[0]


def test_another_caption_each_time_and_the_same_on_any_layout(pairs):
    whole = stream(pairs)
    seen = {}
    for step in range(40):
        batch = whole[step]
        for key, caption in zip(batch["key"], batch["caption"], strict=True):
            seen.setdefault(key, set()).add(caption)
        parts = [stream(pairs, rank=r, world_size=2, accumulate=2)[2 * step + m] for r in range(2) for m in range(2)]
        assert [caption for part in parts for caption in part["caption"]] == batch["caption"]
    assert np.mean([len(captions) for captions in seen.values()]) > 2.5


def test_a_pair_without_its_other_half_is_replaced_and_named(tmp_path):
    texts = [{"txt": b"fine"} if i % 4 else {} for i in range(40)]
    manifest = shards(tmp_path, texts)
    bad = [sample for step in range(5) for sample in stream(manifest)[step]["bad"]]
    assert {int(sample.key) % 4 for sample in bad} == {0} and len(bad) >= 10
    assert all(sample.reason.startswith("no caption") for sample in bad)
    for step in range(5):
        assert stream(manifest)[step]["caption"] == ["fine"] * 8


def test_classes_that_have_codes_for_names_make_no_captions(tmp_path):
    manifest = shards(tmp_path / "set", [{"cls": b"0"}, {"cls": b"1"}], ["n01443537", "n01742172"])
    with pytest.raises(DataError, match=r"codes of WordNet \(n01443537, n01742172\)"):
        captions(manifest, templates=("a {}",))
    (tmp_path / "names.tsv").write_text("wnid\tnames\nn01443537\tgoldfish\nn01742172\tboa\n")
    assert captions(manifest, 1, templates=("a {}",), class_names=str(tmp_path / "names.tsv")) == ["a boa"]


def test_a_set_without_captions_is_refused_before_it_is_read(tmp_path):
    plain = shards(tmp_path / "plain", [{"cls": b"0"}], ["cat"])
    with pytest.raises(DataError, match=r"has no captions, no \.txt and no \.json: put them beside the images"):
        captions(plain)
    texts = shards(tmp_path / "texts", [{"txt": b"a cat"}])
    with pytest.raises(DataError, match=r"has no captions, no \.json: "):
        captions(texts, field="title")
    with pytest.raises(DataError, match=r"need classes, but .*; it has texts: read them with captions\.templates \[\]"):
        captions(texts, templates=("a {}",))
