"""A scene to pixels, in integers only: the same picture for everyone, whatever the machine and the library versions.

Edges are anti-aliased by distance: an edge d pixels away covers a pixel by clip(1/2 - d, 0, 1), held in 1/128, so that
the difference of two colours times a coverage fits 16 bits. Images are planes [3 h w] int16 until the end; coordinates
and distances are int32. `size` is the side of the square image in pixels.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from datamodules.synth_scene import RGB, SIDE, Dice, Scene
from datamodules.synth_shapes import CELLS, SIN, TABLE, TRIG, cosine, distance_table, sine

Ints = NDArray[np.int32]
Shorts = NDArray[np.int16]
_FULL = 128  # coverage of a pixel that is wholly inside; distances are in pixels divided by as much
_CELL = 256  # positions in a distance table have this many steps per node
_RADIUS = CELLS * _CELL  # one radius in these steps


def draw(scene: Scene, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The image [size size 3] and the object's mask [size size] (1 = object, its outline included)."""
    image = _background(scene, size)
    mask = np.zeros((size, size), dtype=np.uint8)
    _draw_object(image, mask, scene, size)
    return np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0)), mask


@lru_cache(maxsize=8)
def _centres(size: int) -> NDArray[np.int64]:
    """Where the pixels' centres are along one side, in 1/65536 of it."""
    return (2 * np.arange(size, dtype=np.int64) + 1) * SIDE // (2 * size)


def _plane(colour: RGB) -> Shorts:
    return np.array(colour, dtype=np.int16)[:, None, None]


def _blend(under: Shorts, over: Shorts, cover: Shorts) -> Shorts:
    change = (over - under) * cover
    change >>= 7
    change += under
    return change


def _covered(distance: Ints) -> Shorts:
    """Coverage by what lies on the negative side of an edge."""
    return _limit(_FULL // 2 - distance)


def _limit(cover: Ints) -> Shorts:
    """Between 0 and `_FULL`; np.clip takes 10 us longer, which is 1% of an image."""
    return np.minimum(np.maximum(cover, 0), _FULL).astype(np.int16)


def _stripes(u: Ints, period: int) -> Ints:
    """Signed distance to the edges of stripes half a period wide, in the units of u."""
    return np.abs(u % period - period // 2) - period // 4


def _dots(u: Ints, v: Ints, period: int) -> Ints:
    """Signed distance to discs on a square lattice, covering a third of the area."""
    x, y = u % period - period // 2, v % period - period // 2
    distance = np.sqrt((x * x + y * y).astype(np.float64)).astype(np.int32)  # a correctly rounded root: same everywhere
    return distance - period * 33 // 100


def _pattern(name: str, u: Ints, v: Ints, period: int, to_pixels: int, shift: int) -> Shorts:
    """Coverage by the second colour; `x * to_pixels >> shift` turns the units of u and v into 1/128 pixel."""
    if name == "dotted":
        return _covered(_dots(u, v, period) * to_pixels >> shift)
    across = _covered(_stripes(u, period) * to_pixels >> shift)
    if name != "checkered":
        return across
    along = _covered(_stripes(v, period) * to_pixels >> shift)
    return across + along - (across * along >> 6)


@lru_cache(maxsize=32)
def _ramps(size: int, nodes: int) -> NDArray[np.int64]:
    """Smooth interpolation from `nodes` points to `size` pixels: [size nodes], each row sums to 256."""
    position = _centres(size) * (nodes - 1)
    left, t = position >> 16, (position & (SIDE - 1)) >> 8
    smooth = t * t * (768 - 2 * t) >> 16
    ramps = np.zeros((size, nodes), dtype=np.int64)
    ramps[np.arange(size), left] = 256 - smooth
    ramps[np.arange(size), left + 1] = smooth
    return ramps


def _cloud(dice: Dice, nodes: int, size: int) -> Ints:
    """Smooth noise from 0 to 255."""
    words = [dice.word() for _ in range((nodes * nodes + 7) // 8)]
    lattice = np.array([word >> shift & 255 for word in words for shift in range(0, 64, 8)], dtype=np.int64)
    ramps = _ramps(size, nodes)
    return (ramps @ lattice[: nodes * nodes].reshape(nodes, nodes) @ ramps.T >> 16).astype(np.int32)


def _background(scene: Scene, size: int) -> Shorts:
    """Two colours in a pattern, drifting to a third."""
    name, period = scene.attributes["background"], scene.ground_period
    dice = Dice(scene.noise)
    centres = _centres(size)
    cos, sin = cosine(scene.ground_degrees), sine(scene.ground_degrees)
    u = ((centres * cos >> 14)[None, :] + ((centres * sin >> 14) + scene.ground_phase)[:, None]).astype(np.int32)
    if name == "gradient":
        ends = (min(cos, 0) + min(sin, 0)) * SIDE // TRIG, (max(cos, 0) + max(sin, 0)) * SIDE // TRIG
        along = (u - scene.ground_phase - ends[0]) // ((ends[1] - ends[0]) >> 7)
        return _blend(_plane(scene.ground), _plane(scene.ground_far), _limit(along))
    if name == "cloudy":
        second = _limit((_cloud(dice, 5, size) * 2 + _cloud(dice, 10, size) - 256) >> 1)
    else:
        v = ((centres * -sin >> 14)[None, :] + (centres * cos >> 14)[:, None]).astype(np.int32)
        if name == "wavy":
            u = u + (SIN[v * 360 // (2 * period) % 360] * period // (TRIG * 4)).astype(np.int32)
        second = _pattern(name, u, v, period, (512 << 9) // period, 9)  # out of focus: only objects have sharp edges
    image = _blend(_plane(scene.ground), _plane(scene.ground_second), second)
    drift = _limit((_cloud(dice, 4, size) * 5 >> 2) - 96) * np.int16(15) >> 4  # the pattern stays visible everywhere
    image = _blend(image, _plane(scene.ground_far), drift)
    right, down = ((centres - SIDE // 2) * gain >> 15 for gain in scene.light)
    image += (right[None, :] + down[:, None]).astype(np.int16)
    np.maximum(image, 0, out=image)
    return np.minimum(image, 255, out=image)


def _span(centre: int, reach: int, size: int) -> slice:
    """The pixels of one axis that an object can touch."""
    return slice(max(0, (centre - reach) * size >> 16), min(size, ((centre + reach) * size >> 16) + 2))


def _object_coordinates(scene: Scene, rows: slice, columns: slice, size: int) -> tuple[Ints, Ints]:
    """Coordinates in the turned frame of the object, in steps of `_RADIUS` to a radius."""
    cos, sin = (f(scene.degrees) * _RADIUS // scene.radius for f in (cosine, sine))
    dx, dy = (_centres(size)[columns] - scene.x)[None, :], (_centres(size)[rows] - scene.y)[:, None]
    u, v = (dx * cos >> 14) + (dy * sin >> 14), (dy * cos >> 14) - (dx * sin >> 14)
    return u.astype(np.int32), v.astype(np.int32)


def _distance(shape: str, u: Ints, v: Ints) -> Ints:
    """Signed distance to the outline in 1/`UNIT` radius, bilinear in the table."""
    table, last = distance_table(shape), (TABLE - 1) * _CELL - 1
    column, row = (np.minimum(np.maximum(x + 2 * _RADIUS, 0), last) for x in (u, v))
    node = (row >> 8) * TABLE + (column >> 8)
    right, down = column & 255, row & 255
    upper, lower = table.take(node), table.take(node + TABLE)
    upper += (table.take(node + 1) - upper) * right >> 8
    lower += (table.take(node + TABLE + 1) - lower) * right >> 8
    return upper + ((lower - upper) * down >> 8)


def _draw_object(image: Shorts, mask: NDArray[np.uint8], scene: Scene, size: int) -> None:
    """Shadow, silhouette in the outline's colour, and the textured fill inside it."""
    reach = scene.radius * 15 // 8  # no outline comes that far
    rows, columns = _span(scene.y, reach, size), _span(scene.x, reach, size)
    u, v = _object_coordinates(scene, rows, columns, size)
    sixteenths = scene.radius * size >> 12  # the radius in 1/16 pixel
    distance = _distance(scene.attributes["shape"], u, v) * sixteenths >> 9  # 1/4096 radius to 1/128 pixel
    fall = max(1, sixteenths * 9 >> 10)  # pixels by which the shadow lies lower and to the right
    shade = image[:, rows.start + fall : rows.stop + fall, columns.start + fall : columns.stop + fall]
    soft = _limit(_FULL // 2 - distance * 3 // (1 + fall))[: shade.shape[1], : shade.shape[2]]
    shade -= shade * (soft * np.int16(40) >> 7) >> 7  # by 5/16 at most
    silhouette = _covered(distance)
    box = image[:, rows, columns]
    outlined = _blend(box, _plane(scene.outline), silhouette)
    width = max(115, sixteenths * 8 * 12 // 100)  # an eighth of the radius, but nearly a pixel
    texture = scene.attributes["texture"]
    fill = _plane(scene.fill)
    if texture != "plain":
        second = _pattern(texture, u + 2 * _RADIUS, v + 2 * _RADIUS, scene.fill_period, sixteenths, 11)
        fill = _blend(fill, _plane(scene.fill_second), second)
    box[...] = _blend(outlined, fill, _covered(distance + width))
    mask[rows, columns] = silhouette >= _FULL // 2
