"""Scenes and their pixels: golden, true to their attributes and captions, right at every size."""

import hashlib
import math
from itertools import pairwise

import numpy as np
import pytest

from datamodules.drawing import draw
from datamodules.synth_scene import ATTRIBUTES, COLOURS, SPLITS, Dice, held_out, scene
from datamodules.synth_shapes import SHAPES, SIN, TABLE, TRIG, UNIT, distance_table, polygons

SCENES = [scene(7, index) for index in range(3000)]

# SHA-256 of image and mask of samples 0..19 of seed 0, split "all". A change means another edition of the pictures:
# raise EDITION in synth.py with it, because sets drawn before and after are not the same data.
GOLDEN = {
    32: "a799c46ae94f8c8117ddc8d2c94ab5671f34d506238cbd434a693e08c4c8a0a7",
    64: "26c16990cd506351ec1a710762f12281d136401c065bcfa168bcdd888199173b",
}  # fmt: skip
GOLDEN_CAPTIONS = "53297d68c64643d5e378e80f2f93b602f0cb7453fad24d24a9bd8ac989084855"


@pytest.mark.parametrize("size", GOLDEN)
def test_the_same_pixels_on_every_machine(size: int) -> None:
    digest = hashlib.sha256()
    for index in range(20):
        for pixels in draw(scene(0, index), size):
            digest.update(pixels.tobytes())
    assert digest.hexdigest() == GOLDEN[size]


def test_the_same_captions_on_every_machine() -> None:
    text = "\n".join(scene(0, index, split).caption for split in SPLITS for index in range(200))
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN_CAPTIONS


def test_the_sine_table_hangs_on_no_last_bit() -> None:
    exact = [math.sin(math.radians(degree)) * TRIG for degree in range(360)]
    assert min(abs(value % 1 - 0.5) for value in exact) > 1e-6
    assert np.abs(SIN - exact).max() <= 0.5


def test_dice_are_splitmix64() -> None:
    dice = Dice()
    assert [dice.word() for _ in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]  # its state 0
    drawn = [Dice(1, 2, index).between(-3, 3) for index in range(700)]
    assert sorted(set(drawn)) == list(range(-3, 4))
    assert min(drawn.count(value) for value in set(drawn)) > 70


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_area_of_the_unit_circle(shape: str) -> None:
    inside = (distance_table(shape) < 0).sum() * (4 / TABLE) ** 2
    assert inside == pytest.approx(math.pi, rel=0.01)
    reach = max(math.hypot(*point) for loop in polygons(shape) for point in loop) / UNIT
    assert reach < 1.8  # drawing.py looks at 15/8 of the radius


def test_distance_tables_against_formulas() -> None:
    axis = (np.arange(TABLE) - TABLE // 2) * 4 / TABLE
    radius = np.hypot(axis[None, :], axis[:, None])
    circle, ring = (distance_table(shape).reshape(TABLE, TABLE) / UNIT for shape in ("circle", "ring"))
    assert np.abs(circle - (radius - 1)).max() < 0.004  # a polygon of 72 corners
    outer, inner = (max(math.hypot(*point) for point in loop) / UNIT for loop in polygons("ring"))
    assert np.abs(ring - np.maximum(radius - outer, inner - radius)).max() < 0.006
    side = math.sqrt(math.pi) / 2
    x, y = np.abs(axis[None, :]) - side, np.abs(axis[:, None]) - side
    square = np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)
    assert np.abs(distance_table("square").reshape(TABLE, TABLE) / UNIT - square).max() < 0.004


def test_attributes_are_uniform_and_independent() -> None:
    names = list(ATTRIBUTES)
    codes = {name: np.array([ATTRIBUTES[name].index(s.attributes[name]) for s in SCENES]) for name in names}
    for name in names:
        counts = np.bincount(codes[name], minlength=len(ATTRIBUTES[name]))
        assert counts.min() > 0.75 * len(SCENES) / len(ATTRIBUTES[name])
    for i, one in enumerate(names):
        for other in names[:i]:
            rows, columns = len(ATTRIBUTES[one]), len(ATTRIBUTES[other])
            table = np.bincount(codes[one] * columns + codes[other], minlength=rows * columns).reshape(rows, columns)
            expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
            freedom = (rows - 1) * (columns - 1)
            chi2 = ((table - expected) ** 2 / expected).sum()
            assert chi2 < freedom + 4 * math.sqrt(2 * freedom), (one, other)


def test_splits_keep_pairs_apart() -> None:
    assert {sum(held_out(shape, colour) for colour in COLOURS) for shape in SHAPES} == {1}
    assert all(any(held_out(shape, colour) for shape in SHAPES) for colour in COLOURS)
    for split, allowed in (("train", {False}), ("test", {False}), ("test_unseen", {True}), ("all", {False, True})):
        drawn = [scene(0, index, split).attributes for index in range(400)]
        assert {held_out(a["shape"], a["colour"]) for a in drawn} == allowed
        assert {a["shape"] for a in drawn} == set(SHAPES)
        assert {a["colour"] for a in drawn} == set(COLOURS)
    places = {(s.x, s.y, s.radius) for split in SPLITS for s in (scene(0, index, split) for index in range(100))}
    assert len(places) > 398  # no image is in two splits


def test_mask_agrees_with_size_and_place() -> None:
    for s in SCENES[:150]:
        image, mask = draw(s, 64)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}
        area = math.pi * (s.radius / 65536) ** 2
        assert mask.mean() == pytest.approx(area, rel=0.1)
        rows, columns = np.nonzero(mask)
        assert all(axis.min() > 0 and axis.max() < 63 for axis in (rows, columns))  # nothing is cut off
        assert (columns.mean() + 0.5) / 64 == pytest.approx(s.x / 65536, abs=0.01)
        assert (rows.mean() + 0.5) / 64 == pytest.approx(s.y / 65536, abs=0.01)
        free = [(rows.min(), 63 - rows.max()), (columns.min(), 63 - columns.max())]
        for (before, after), first, last in zip(free, ("top", "left"), ("bottom", "right"), strict=True):
            place = s.attributes["place"]
            wanted = (first in place) - (last in place)
            if wanted and before + after > 6:
                assert (after > before) == (wanted > 0), place


def test_colour_is_what_it_is_called() -> None:
    named = np.array(list(COLOURS.values()))
    for s in SCENES[:300]:
        if s.attributes["texture"] == "plain":
            image, mask = draw(s, 64)
            inner = mask.astype(bool)
            for _ in range(3):  # away from the outline
                inner = (
                    inner & np.roll(inner, 1, 0) & np.roll(inner, -1, 0) & np.roll(inner, 1, 1) & np.roll(inner, -1, 1)
                )
            if inner.sum() > 4:
                nearest = np.linalg.norm(named - np.median(image[inner], axis=0), axis=1).argmin()
                assert list(COLOURS)[nearest] == s.attributes["colour"]


def test_tilted_right_means_right() -> None:
    arrows = [s for s in SCENES if s.attributes["shape"] == "arrow" and s.attributes["rotation"] != "upright"][:40]
    for s in arrows:
        _, mask = draw(s, 128)
        rows, columns = np.nonzero(mask)
        tip = columns[rows <= rows.min() + 1].mean() - columns.mean()
        assert (tip > 0) == (s.attributes["rotation"] == "tilted right")


def test_a_scene_looks_the_same_at_every_size() -> None:
    for s in SCENES[:20]:
        large, mask = draw(s, 256)
        small = draw(s, 64)[0].astype(float)
        shrunk = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(shrunk - small).mean() < 6
        assert mask.mean() == pytest.approx(draw(s, 64)[1].mean(), rel=0.08)


@pytest.mark.parametrize("size", [16, 17, 333, 1024])
def test_extreme_and_odd_sizes(size: int) -> None:
    for s in SCENES[: 40 if size < 100 else 3]:
        image, mask = draw(s, size)
        assert image.shape == (size, size, 3) and mask.shape == (size, size)
        assert 0 < mask.mean() < 0.4
        assert image.std() > 5


def test_captions_are_true() -> None:
    sizes, colours = set(ATTRIBUTES["size"]), set(COLOURS)
    for s in SCENES:
        words = s.caption.replace(",", " ").replace(":", " ").split()
        about = s.attributes
        assert set(words) & set(SHAPES) == {about["shape"]}
        assert set(words) & colours == {about["colour"]}
        assert set(words) & sizes <= {about["size"]}
        assert ("tilted" in words) <= (about["rotation"] != "upright")
        assert not ({"tilted", "upright"} & set(words) and about["shape"] in ("circle", "ring"))
        for preposition in ("at the ", "on the ", "in the "):
            if preposition in s.caption:
                assert s.caption.split(preposition)[1].startswith(about["place"])
        for kind in ("striped", "dotted", "checkered", "wavy", "cloudy", "gradient"):
            assert (kind in words) <= (kind in (about["texture"], about["background"]))
        for article, following in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (following[0] in "aeiou")
    assert len({s.caption for s in SCENES}) > 0.8 * len(SCENES)
    orders = {(s.caption.index(s.attributes["shape"]) < s.caption.index(s.attributes["colour"])) for s in SCENES}
    assert orders == {True, False}


def test_the_mask_shows_the_shape() -> None:
    """Nearest neighbours on masks, moved to the middle and brought to one size, know the class."""
    crops = []
    for s in SCENES[:600]:
        _, mask = draw(s, 64)
        reach = 1.9 * s.radius / 1024
        axis = ((np.arange(24) + 0.5) / 12 - 1) * reach
        rows, columns = ((axis + centre / 1024).astype(int) for centre in (s.y, s.x))
        inside = ((rows >= 0) & (rows < 64))[:, None] & ((columns >= 0) & (columns < 64))[None, :]
        crops.append((mask[rows.clip(0, 63)][:, columns.clip(0, 63)] * inside).ravel())
    crops = np.array(crops, dtype=np.float32)
    labels = np.array([SHAPES.index(s.attributes["shape"]) for s in SCENES[:600]])
    near = ((crops[500:, None] - crops[None, :500]) ** 2).sum(-1).argmin(1)
    assert (labels[:500][near] == labels[500:]).mean() > 0.9
