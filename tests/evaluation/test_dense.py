"""Segmentation and localisation on drawn images, whose masks are known."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import DataError
from datamodules.mask_set import MaskBatches, MaskClasses, mask_classes
from datamodules.shard_reader import BadSampleError, ShardReader
from datamodules.shard_writer import ShardWriter
from datamodules.whole_images import WholeImages
from evaluation.boxes import read_boxes
from evaluation.errors import EvaluationError
from evaluation.frozen_heads import on_device
from evaluation.image_data import ImageData
from evaluation.localisation import Localisation, attention_box, iou, localisation
from evaluation.segmentation import Segmentation, iou_result, pixel_counts, segmentation
from tasks.encoders import Encoder
from tests.evaluation.conftest import CONFIG

pytestmark = pytest.mark.usefixtures("cache")  # where it is kept which classes masks have

NONE = np.zeros(0, np.int64)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_masked(folder: Path, count: int, seed: int, value: int = 1, ground: int = 0) -> Path:
    """A bright rectangle on dark noise, and its mask; every tenth mask has a strip that is ignored."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=20) as writer:
        for i in range(count):
            top, left = 4 * rng.integers(0, 3), 4 * rng.integers(0, 3)
            pixels, mask = rng.integers(0, 60, (16, 16, 3)).astype(np.uint8), np.full((16, 16), ground, np.uint8)
            pixels[top : top + 8, left : left + 8] += 180
            mask[top : top + 8, left : left + 8] = value
            if i % 10 == 0:
                mask[0] = 255
            writer.write(f"{i:04d}", {"png": png(pixels), "mask.png": png(mask)})
    return folder


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("masked")
    write_masked(root / "train", 60, seed=0)
    write_masked(root / "test", 30, seed=1)
    return root


def data_of(test: Path) -> ImageData:
    return ImageData(test, NONE, (), NONE, test, NONE, (), NONE, 0, workers=0, batch_size=16, progress=False)


def encoder_of(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(CONFIG).eval()


def test_masks_are_cut_and_mirrored_with_their_images(masked: Path) -> None:
    for seed in (None, 3):
        batches = MaskBatches(masked / "train", crop_size=12, resize=24, batch_size=60, seed=seed)
        batch = next(batches.batches(workers=0))
        bright = batch["image"].float().mean(1) > 120
        known = batch["mask"] != 255
        assert batch["mask"].shape == (60, 12, 12)
        assert (bright == (batch["mask"] == 1))[known].float().mean() > 0.95
    assert batch["key"] != sorted(batch["key"])
    assert mask_classes(batches, workers=0) == ({0: 60, 1: 60}, [])


def test_a_linear_layer_finds_bright_patches_and_repeats(masked: Path) -> None:
    config = Segmentation(steps=60, batch_size=10, rate=1e-2)
    found = segmentation(encoder_of(), masked / "train", masked / "test", data_of(masked / "test"), config, seed=0)
    assert found["miou"] > found["majority_miou"] + 20 and found["images"] == 30
    assert found["interval"][0] < found["miou"] < found["interval"][1]
    assert len(found["per_class"]) == 2 and found["miou"] == pytest.approx(np.mean(found["per_class"]))
    assert found["learned"] == {"steps": 60, "images_seen": 600}
    again = segmentation(encoder_of(), masked / "train", masked / "test", data_of(masked / "test"), config, seed=0)
    assert again == found


def test_images_without_masks_are_not_counted_as_learned(tmp_path: Path) -> None:
    pixels, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
    mask[:8] = 1
    for name, rows in (("half", slice(0, 16)), ("other", slice(4, 12))):
        with ShardWriter(tmp_path / name, samples_per_shard=20) as writer:
            for i in range(12):
                given = {"mask.png": png(mask[rows])} if i % 2 else {}
                writer.write(f"{i:04d}", {"png": png(pixels), **given})
    few = Segmentation(steps=3, batch_size=12)
    half = tmp_path / "half"
    found = segmentation(encoder_of(), half, half, data_of(half), few, 0)
    assert found["learned"] == {"steps": 3, "images_seen": 18} and found["images"] == 6
    with pytest.raises(EvaluationError, match="no train image has a mask of its size"):
        segmentation(encoder_of(), tmp_path / "other", half, data_of(half), few, 0)


def test_a_class_in_a_single_mask_is_known_before_anything_is_learned(
    masked: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, plain = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
    rare = plain.copy()
    rare[:8] = 4
    for name, mask in (("train", rare), ("test", plain)):
        with ShardWriter(tmp_path / name, samples_per_shard=20) as writer:
            for i in range(40):
                writer.write(f"{i:04d}", {"png": png(pixels), "mask.png": png(mask if i == 38 else plain)})
    few = Segmentation(steps=1, batch_size=4)
    found = segmentation(encoder_of(), tmp_path / "train", tmp_path / "test", data_of(tmp_path / "test"), few, 0)
    assert len(found["per_class"]) == 5
    for read in (mask_classes, None):  # the second time the masks were read before
        monkeypatch.setattr("evaluation.segmentation.mask_classes", read)
        with pytest.raises(EvaluationError, match=r"no mask of train has: 4 \(in 1\)"):
            segmentation(encoder_of(), masked / "train", tmp_path / "train", data_of(tmp_path / "test"), few, 0)


def test_masks_that_cannot_be_read_for_a_moment_are_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
    mask[:8] = 1
    with ShardWriter(tmp_path / "set", samples_per_shard=20) as writer:
        for i in range(40):
            writer.write(f"{i:04d}", {"png": png(pixels), "mask.png": png(mask + mask if i == 7 else mask)})
    whole, fails, root, facts = ShardReader.member, [True], tmp_path / "set", tmp_path / "here"

    def read(reader: ShardReader, shard: int, sample: int, extension: str) -> bytearray | None:
        if fails[0] and sample == 7 and shard == 0:
            raise BadSampleError("shard-000000.tar", "0007", "cannot be read: Input/output error", passing=True)
        return whole(reader, shard, sample, extension)

    def counted(*how: Any) -> MaskClasses:
        fails[0] = True
        found = mask_classes(*how)
        fails[0] = False
        return found

    monkeypatch.setattr(ShardReader, "member", read)
    few, data = Segmentation(steps=10, batch_size=4), replace(data_of(root), cache_dir=facts)
    with pytest.raises(
        EvaluationError, match=r"1 of 40 images of .* cannot be read now \(first: shard-000000.tar, 0007"
    ):
        segmentation(encoder_of(), root, root, data, few, 0)
    monkeypatch.setattr("evaluation.lost_images.MOST_LOST", 0.5)
    with monkeypatch.context() as patched:
        patched.setattr("evaluation.segmentation.mask_classes", counted)
        with pytest.raises(
            EvaluationError, match=r"a mask of train has class 2, but none had it when .*: run the same"
        ):
            segmentation(encoder_of(), root, root, data, few, 0)
    assert not facts.exists(), "what may be there another time is not forgotten"
    assert len(segmentation(encoder_of(), root, root, data, few, 0)["per_class"]) == 3
    assert len(list((facts / "facts").iterdir())) == 1


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_that_fail_while_it_learns_or_scores_are_passed_over_up_to_the_bound(
    part: str, masked: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, bad = ShardReader.image, set[int]()

    def read(reader: ShardReader, shard: int, sample: int) -> tuple[str, torch.Tensor]:
        if reader.manifest.root == masked / part and sample in bad and shard == 0:
            raise BadSampleError(reader.name(shard), f"{sample}", "cannot be read: Input/output error", passing=True)
        return whole(reader, shard, sample)

    few, roots = Segmentation(steps=30, batch_size=10), (masked / "train", masked / "test")
    segmentation(encoder_of(), *roots, data_of(roots[1]), few, 0)  # the masks are known from now on
    monkeypatch.setattr(ShardReader, "image", read)
    bad |= {1, 2}
    seen = list[int]()
    monkeypatch.setattr("evaluation.segmentation.on_device", lambda *given: (seen.append(1), on_device(*given))[1])
    with pytest.raises(EvaluationError, match=rf"\d of \d+ images of .*{part} cannot be read now \(first: shard"):
        segmentation(encoder_of(), *roots, data_of(roots[1]), few, 0)
    assert part == "test" or len(seen) < 6, "within the first epoch, not after hours"
    monkeypatch.setattr("evaluation.lost_images.MOST_LOST", 0.1)
    found = segmentation(encoder_of(), *roots, data_of(roots[1]), few, 0)
    if part == "test":
        assert found["images"] == 28
    else:
        assert found["learned"]["steps"] == 30 and found["learned"]["images_seen"] < 300


def test_masks_of_images_that_cannot_be_used_do_not_count(tmp_path: Path) -> None:
    pixels, mask = np.zeros((16, 16, 3), np.uint8), np.ones((16, 16), np.uint8)
    with ShardWriter(tmp_path / "set", samples_per_shard=20) as writer:
        writer.write("fine", {"png": png(pixels), "mask.png": png(mask)})
        writer.write("spoilt", {"png": b"this is no image", "mask.png": png(2 * mask)})
        writer.write("other", {"png": png(pixels), "mask.png": png(3 * mask[:8])})
    images = MaskBatches(tmp_path / "set", crop_size=16, resize=16, batch_size=2)
    assert mask_classes(images, workers=0) == ({1: 1}, [])


def test_mean_iou_by_hand() -> None:
    predicted, mask = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 1], [0, 255]])
    counts = pixel_counts(predicted, mask, 3)
    assert counts.tolist() == [1, 1, 0, 1, 2, 0, 2, 1, 0]
    found = iou_result(np.stack([counts, counts]), seed=0)
    assert found["miou"] == pytest.approx(50) and found["per_class"] == pytest.approx([50, 50, None])
    assert found["pixel_accuracy"] == pytest.approx(200 / 3)
    assert found["majority_miou"] == pytest.approx(100 / 3)


def test_what_cannot_be_segmented_is_one_line(masked: Path, world: Path, tmp_path: Path) -> None:
    test, few = masked / "test", Segmentation(steps=2, batch_size=4)
    with pytest.raises(DataError, match="has no masks"):
        segmentation(encoder_of(), world / "train", test, data_of(test), few, 0)
    with pytest.raises(EvaluationError, match="one class only"):
        segmentation(encoder_of(), write_masked(tmp_path / "empty", 8, 0, value=0), test, data_of(test), few, 0)
    more = write_masked(tmp_path / "more", 8, 0, value=7)
    with pytest.raises(EvaluationError, match=r"of test have classes that no mask of train has: 7 \(in 8\)"):
        segmentation(encoder_of(), masked / "train", more, data_of(more), few, 0)
    mixed = replace(data_of(more), drop_unknown=True)
    found = segmentation(encoder_of(), masked / "train", more, mixed, few, 0)
    assert found["left_out"] == {7: 8} and found["per_class"][0] and len(found["per_class"]) == 2
    with pytest.raises(EvaluationError, match="no pixel of test has a class of train"):
        all_new = write_masked(tmp_path / "new", 8, 0, value=7, ground=9)
        segmentation(encoder_of(), masked / "train", all_new, mixed, few, 0)
    with pytest.raises(EvaluationError, match=r"a mask has class 7, but 2 were expected: .*segmentation.classes=N"):
        segmentation(encoder_of(), more, more, data_of(more), replace(few, classes=2), 0)
    ill = encoder_of()
    with torch.no_grad():
        ill.trunk.blocks[0].norm1.weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="not finite at step 0: the encoder has diverged"):
        segmentation(ill, masked / "train", test, data_of(test), few, 0)
    with pytest.raises(EvaluationError, match="not finite, the encoder has diverged"):
        localisation(ill, test, data_of(test), Localisation())
    with pytest.raises(EvaluationError, match="segmentation needs steps"):
        segmentation(encoder_of(), test, test, data_of(test), Segmentation(steps=0), 0)


def test_a_box_around_the_largest_region() -> None:
    weights = torch.zeros(4, 4)
    weights[0, 0] = 3.0
    weights[1:3, 2:4] = 2.0
    assert attention_box(weights, 0.9).tolist() == [0.5, 0.25, 1.0, 0.75]
    assert attention_box(weights, 0.1).tolist() == [0, 0, 0.25, 0.25]
    assert iou(np.array([0, 0, 1, 1.0]), np.array([[0, 0, 1, 1], [0.5, 0, 1.5, 1], [2, 2, 3, 3]])).tolist() == (
        pytest.approx([1, 1 / 3, 0])
    )


class Looks:
    """Attention where the image is bright, in every layer and head."""

    def __init__(self, _: Encoder, images: torch.Tensor) -> None:
        shares = torch.nn.functional.avg_pool2d((images.float().mean(1, keepdim=True) > 120).float(), 4)
        self.weights = shares[None]


def test_localisation_against_masks_and_a_table(masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = masked / "test"

    monkeypatch.setattr("evaluation.localisation.class_attention", Looks)
    found = localisation(encoder_of(), test, data_of(test), Localisation(mass=0.99))
    assert found["corloc"] == found["pointing"] == 100 and found["images"] == 30
    assert found["whole_image"] == 0 and found["mean_iou"] > 90
    rows = ["file\tx0\ty0\tx1\ty1", "0003.png\t0\t0\t1\t1", "0004.png\t0\t0\t16\t16", "no such.png\t0\t0\t1\t1",
            "0005.png\t4\t4\t12\t12", "0006.png\t0\t4\t8\t12"]  # fmt: skip
    (tmp_path / "boxes.tsv").write_text("\n".join(rows))
    told = localisation(encoder_of(), test, data_of(test), Localisation(boxes=str(tmp_path / "boxes.tsv")))
    assert told["images"] == 4 and told["whole_image"] == 25
    assert told["centre_box"] == 25  # the box of 64 pixels inside the 125 of the middle
    (tmp_path / "large.tsv").write_text("\n".join([rows[0], "0003.png\t10\t10\t40\t14"]))
    with pytest.raises(EvaluationError, match="0003 ends outside of the image of 16 x 16 pixels"):
        localisation(encoder_of(), test, data_of(test), Localisation(boxes=str(tmp_path / "large.tsv")))
    with pytest.raises(EvaluationError, match="there is no table of boxes"):
        Localisation(boxes=str(tmp_path / "none.tsv")).check()


def test_boxes_are_of_the_image_as_it_is_whatever_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, mask = np.zeros((16, 32, 3), np.uint8), np.zeros((16, 32), np.uint8)
    pixels[4:12, 16:32], mask[4:12, 16:32] = 255, 1
    with ShardWriter(tmp_path / "wide", samples_per_shard=4) as writer:
        writer.write("0", {"png": png(pixels), "mask.png": png(mask)})
    monkeypatch.setattr("evaluation.localisation.class_attention", Looks)
    found = localisation(encoder_of(), tmp_path / "wide", data_of(tmp_path / "wide"), Localisation(mass=0.99))
    assert found["mean_iou"] == pytest.approx(100) and found["corloc"] == 100


def test_attention_of_a_real_encoder_is_scored(masked: Path) -> None:
    found = localisation(encoder_of(), masked / "test", data_of(masked / "test"), Localisation())
    assert found["images"] == 30 and 0 <= found["corloc"] <= 100
    assert found["interval"][0] <= found["corloc"] <= found["interval"][1]
    with pytest.raises(EvaluationError, match="no class token"):
        bare = Encoder(replace(CONFIG, class_token=False)).eval()
        localisation(bare, masked / "test", data_of(masked / "test"), Localisation())


def test_boxes_that_cannot_be_used_are_one_line(masked: Path, world: Path, tmp_path: Path) -> None:
    keys = ["a.tar/n01/cat_1", "a.tar/n02/cat_1", "a.tar/n01/dog_2"]
    table = tmp_path / "boxes.csv"

    def told(text: str) -> dict[str, np.ndarray]:
        table.write_text(text)
        return read_boxes(str(table), keys)

    head = "file,x0,y0,x1,y1\n"
    found = told(head + "dog_2.JPEG,0,1,5,6\nn02/cat_1.JPEG,1,1,2,2\nn02/cat_1.JPEG,3,3,4,4\ncat_1.png,0,0,1,1\n"
                 "dog_2.png,3,0,3,5\n")  # fmt: skip
    assert {key: len(boxes) for key, boxes in found.items()} == {keys[2]: 1, keys[1]: 2}
    for text, message in (
        ("", "has no rows"),
        ("file,x0\na,1\n", "not the columns"),
        (head + "dog_2.png,a,1,2,3\n", "line 2: a box"),
        (head + "dog_2.png,3,1,2,3\n", "x0 must be below"),
        (head + "x.png,1,1,2,3\n", "no row of"),
    ):
        with pytest.raises(EvaluationError, match=message):
            told(text)
    with pytest.raises(EvaluationError, match="cannot read the boxes"):
        read_boxes(str(tmp_path / "none.tsv"), keys)
    with pytest.raises(EvaluationError, match="found no boxes"):
        localisation(encoder_of(), world / "test", data_of(world / "test"), Localisation())
    with pytest.raises(EvaluationError, match="is a share"):
        Localisation(mass=0.0).check()
    assert len(WholeImages(world / "test", side=16, batch_size=16)) == 4
