"""What is in a drawn image: attributes, the numbers behind them, and a true caption, all from (seed, split, index).

All attributes are drawn independently, so that none gives another away; only the splits tie shape and colour, by
leaving pairs out. Lengths are in units of 1/65536 of the image's side: the same scene is drawn at any size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from datamodules.synth_shapes import ROUND_SHAPES, SHAPES, UNIT, extent

T = TypeVar("T")
RGB = tuple[int, int, int]
SIDE = 1 << 16
SPLITS = ("all", "train", "test", "test_unseen")

COLOURS: dict[str, RGB] = {
    "red": (212, 44, 48),
    "orange": (240, 138, 32),
    "yellow": (244, 210, 56),
    "green": (62, 160, 76),
    "turquoise": (50, 186, 184),
    "blue": (48, 98, 214),
    "purple": (132, 66, 176),
    "pink": (240, 128, 178),
}
_RADII = {"small": (11100, 12100), "medium": (13600, 15000), "large": (16600, 18300)}
_TILTS = {"tilted left": (-40, -14), "upright": (-9, 9), "tilted right": (14, 40)}
_BORDER = 700  # of the image stay free around an object
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(_RADII),
    "place": ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"),
    "texture": ("plain", "striped", "dotted", "checkered"),
    "background": ("gradient", "striped", "dotted", "checkered", "wavy", "cloudy"),
    "rotation": tuple(_TILTS),
}
"""Every attribute of an image and its values; the first is the class."""

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def _mix(word: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


class Dice:
    """A stream of integers that depends on nothing but the numbers given: splitmix64, in Python's integers."""

    def __init__(self, *numbers: int) -> None:
        self._state = 0
        for number in numbers:
            self._state = _mix((self._state + number + _GOLDEN) & _MASK)

    def word(self) -> int:
        """The next 64 bits."""
        self._state = (self._state + _GOLDEN) & _MASK
        return _mix(self._state)

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + (self.word() * (high - low + 1) >> 64)

    def pick(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.between(0, len(values) - 1)]


def held_out(shape: str, colour: str) -> bool:
    """Whether a pair is kept from the splits train and test, for test_unseen: one colour of each shape."""
    return (3 * SHAPES.index(shape)) % len(COLOURS) == ATTRIBUTES["colour"].index(colour)


@dataclass(frozen=True, slots=True)
class Scene:
    """One image before it has pixels."""

    attributes: dict[str, str]
    x: int
    y: int
    radius: int  # of the circle of equal area
    degrees: int
    fill: RGB
    fill_second: RGB  # stripes, dots and checks on the object
    fill_period: int  # in radii / 16384
    outline: RGB
    ground: RGB
    ground_second: RGB
    ground_far: RGB  # the background drifts towards this colour, so that no two of its corners agree
    ground_degrees: int
    ground_period: int
    ground_phase: int
    light: tuple[int, int]  # what the background's right and lower edges gain in brightness, and the others lose
    noise: int
    caption: str


def _vary(colour: RGB, by: int, dice: Dice) -> RGB:
    red, green, blue = (min(255, max(0, channel + dice.between(-by, by))) for channel in colour)
    return red, green, blue


def _towards(colour: RGB, other: RGB, percent: int) -> RGB:
    red, green, blue = ((a * (100 - percent) + b * percent) // 100 for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _luma(colour: RGB) -> int:
    return (77 * colour[0] + 150 * colour[1] + 29 * colour[2]) >> 8


def _grounds(dice: Dice) -> tuple[RGB, RGB, RGB]:
    """Two muted colours that can be told apart, and a third that the background drifts to."""
    level = dice.between(40, 215)
    step = dice.between(40, 80) * (1 if level < 128 else -1)
    far = dice.between(30, 225)
    first, second, third = (_vary((grey, grey, grey), 50, dice) for grey in (level, level + step, far))
    return first, second, third


def _position(place: str, shape: str, degrees: int, radius: int, dice: Dice) -> tuple[int, int]:
    """The centre: the turned object leans towards `place`, as far as the image's border lets it."""
    row = next((row for row in ("top", "bottom") if row in place), "middle")
    column = next((column for column in ("left", "right") if column in place), "middle")
    centre = []
    for (low, high), names, name in zip(extent(shape, degrees), (_COLUMNS, _ROWS), (column, row), strict=True):
        before, after = (abs(reach) * radius // UNIT for reach in (low, high))
        free = SIDE - before - after - 2 * _BORDER
        centre.append(_BORDER + before + free * (34 * names.index(name) + dice.between(0, 32)) // 100)
    return centre[0], centre[1]


Only = Sequence[tuple[str, str]]
"""Attributes that have one value in all images of a set: ((name, value), ...), never shape or colour."""


def scene(seed: int, index: int, split: str = "all", only: Only = ()) -> Scene:
    """The scene of one index. Images of different splits differ, also for the same seed and index."""
    dice = Dice(seed, SPLITS.index(split), index)
    shape = dice.pick(SHAPES)
    colours = [c for c in COLOURS if split == "all" or held_out(shape, c) == (split == "test_unseen")]
    attributes = {"shape": shape, "colour": dice.pick(colours)}
    attributes |= {name: dice.pick(values) for name, values in ATTRIBUTES.items() if name not in attributes}
    attributes |= dict(only)
    radius = dice.between(*_RADII[attributes["size"]])
    degrees = dice.between(*_TILTS[attributes["rotation"]])
    x, y = _position(attributes["place"], shape, degrees, radius, dice)
    fill = _vary(COLOURS[attributes["colour"]], 14, dice)
    ground, ground_second, ground_far = _grounds(dice)
    dark = _luma(ground) + _luma(ground_second) > 256
    return Scene(
        attributes=attributes,
        x=x,
        y=y,
        radius=radius,
        degrees=degrees,
        fill=fill,
        fill_second=_towards(fill, dice.pick([(255, 255, 255), (0, 0, 0)]), dice.between(28, 42)),
        fill_period=dice.between(8200, 11000),
        outline=_vary((26, 24, 32) if dark else (236, 234, 228), 14, dice),
        ground=ground,
        ground_second=ground_second,
        ground_far=ground_far,
        ground_degrees=dice.between(0, 359),
        ground_period=dice.between(12000, 20000),
        ground_phase=dice.between(0, SIDE - 1),
        light=(dice.between(-90, 90), dice.between(-90, 90)),
        noise=dice.word(),
        caption=_caption(attributes, dice),
    )


_TEMPLATES = (
    "{a_size} {texture} {colour} {shape} {place} on {a_background} background",
    "{place}, {a_size} {texture} {colour} {shape} on {a_background} background",
    "on {a_background} background, {a_size} {colour} {shape} {pattern} {place}",
    "{a_background} background with {a_texture} {colour} {shape} {place}",
    "{colour} {shape}, {size}, {texture}, {place}, {background} background",
    "{a_shape} {place}: {size}, {colour}, {texture}, and {a_background} background behind it",
    "{a_size} {shape} in {colour} {pattern}, {place}",
    "{a_texture} {shape} in {colour} over {a_background} background",
    "{a_colour} {shape} {place}, {tilt}",
    "{a_size} {colour} {shape}, {tilt}, on {a_background} background",
    "a picture of {a_texture} {colour} {shape}",
    "{a_size} {colour} {shape}",
    "{a_colour} {shape} {place}",
    "{a_colour} {shape}",
)
_PATTERNS = {"plain": "of one colour", "striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}


def _caption(attributes: dict[str, str], dice: Dice) -> str:
    """A sentence that is true of the image; it always names shape and colour, the rest in varying order or not."""
    words = dict(attributes)
    place = attributes["place"]
    words["place"] = f"{'on' if place in ('left', 'right') else 'in' if place == 'centre' else 'at'} the {place}"
    words["pattern"] = _PATTERNS[attributes["texture"]]
    words["tilt"] = attributes["rotation"].replace("tilted", "tilted to the")
    words |= {f"a_{key}": f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for key, word in words.items()}
    turned = attributes["shape"] not in ROUND_SHAPES
    return dice.pick([template for template in _TEMPLATES if turned or "{tilt}" not in template]).format(**words)
