"""The ten outlines of the drawn images, as integer polygons and as tables of signed distances.

Every outline is scaled to the area of a circle of radius 1, so that the amount of a colour in an image says nothing
about the shape. Only integers and correctly rounded IEEE operations (+ - * / sqrt, each its own NumPy call) are used,
so that the tables are the same on every machine; the sine table is rounded far from any half (a test holds that).

Screen coordinates: x to the right, y down; an angle of 0 degrees points up and grows clockwise.
"""

import math
from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent", "arrow", "drop")
ROUND_SHAPES = frozenset({"circle", "ring"})  # nobody can see how these are turned

TRIG = 1 << 14  # sine and cosine are stored times this
SIN = np.array([round(math.sin(math.radians(degree)) * TRIG) for degree in range(360)], dtype=np.int64)
UNIT = 4096  # one radius, in polygon coordinates and in table values
TABLE = 256  # a table has TABLE x TABLE nodes over [-2, 2) radii
CELLS = TABLE // 4  # nodes per radius

Point = tuple[int, int]


def sine(degree: int) -> int:
    """Sine of whole degrees, times `TRIG`."""
    return int(SIN[degree % 360])


def cosine(degree: int) -> int:
    """Cosine of whole degrees, times `TRIG`."""
    return int(SIN[(degree + 90) % 360])


def _arc(degrees: Iterable[int], radius: int = 1000, x: int = 0, y: int = 0) -> list[Point]:
    """Points on a circle around (x, y)."""
    return [(x + sine(a) * radius // TRIG, y - cosine(a) * radius // TRIG) for a in degrees]


def _star() -> list[Point]:
    return [point for i in range(10) for point in _arc([36 * i], radius=500 if i % 2 else 1000)]


def _cross() -> list[Point]:
    arm = [(-360, -360), (-360, -1000), (360, -1000)]
    quarters: list[list[Point]] = [
        arm,
        [(-y, x) for x, y in arm],
        [(-x, -y) for x, y in arm],
        [(y, -x) for x, y in arm],
    ]
    return [point for quarter in quarters for point in quarter]


def _heart() -> list[Point]:
    points = []
    for t in range(0, 360, 6):
        x = 16 * sine(t) ** 3 // TRIG**2
        y = 13 * cosine(t) - 5 * cosine(2 * t) - 2 * cosine(3 * t) - cosine(4 * t)
        points.append((x, -y))
    return points


def _crescent() -> list[Point]:
    """A disc with a bite from the right, by a circle half a radius away; they meet 50 degrees above and below."""
    bite = math.isqrt(1000**2 + 500**2 - 1000 * 1000 * cosine(50) // TRIG)
    return _arc(range(140, 401, 5)) + _arc(range(5, -186, -5), radius=bite, x=500)


_DRAWN: dict[str, list[list[Point]]] = {
    "circle": [_arc(range(0, 360, 5))],
    "square": [_arc([45, 135, 225, 315])],
    "triangle": [_arc([0, 120, 240])],
    "star": [_star()],
    "ring": [_arc(range(0, 360, 5)), _arc(range(360, 0, -5), radius=560)],
    "cross": [_cross()],
    "heart": [_heart()],
    "crescent": [_crescent()],
    "arrow": [[(0, -1000), (850, -50), (350, -50), (350, 1000), (-350, 1000), (-350, -50), (-850, -50)]],
    "drop": [[(0, -1000 * TRIG // cosine(62)), *_arc(range(60, 301, 5))]],
}  # fmt: skip


def _moments(loop: list[Point]) -> tuple[int, int, int]:
    """Twice the area, and six times the area's first moments in x and y (shoelace formula)."""
    area = moment_x = moment_y = 0
    for (x0, y0), (x1, y1) in zip(loop, loop[1:] + loop[:1], strict=True):
        cross = x0 * y1 - x1 * y0
        area, moment_x, moment_y = area + cross, moment_x + (x0 + x1) * cross, moment_y + (y0 + y1) * cross
    return area, moment_x, moment_y


@cache
def polygons(shape: str) -> list[list[Point]]:
    """The closed loops of one shape: centred on its centroid, of area pi `UNIT`^2; holes turn the other way round."""
    sums = [_moments(loop) for loop in _DRAWN[shape]]
    area, moment_x, moment_y = (sum(column) for column in zip(*sums, strict=True))
    # scale = UNIT sqrt(pi / (area / 2)), kept times 2^20; the centroid is moment / (3 area)
    scale = math.isqrt((UNIT * UNIT * 2 * 355 << 40) // (113 * abs(area)))
    return [
        [((3 * area * x - moment_x) * scale // (3 * area << 20), (3 * area * y - moment_y) * scale // (3 * area << 20))
         for x, y in loop]
        for loop in _DRAWN[shape]
    ]  # fmt: skip


@cache
def extent(shape: str, degrees: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How far the turned shape reaches: ((left, right), (up, down)) of its centroid, in radii times `UNIT`."""
    cos, sin = cosine(degrees), sine(degrees)
    points = [(x * cos - y * sin, x * sin + y * cos) for loop in polygons(shape) for x, y in loop]
    (left, right), (up, down) = ((min(axis) // TRIG, max(axis) // TRIG) for axis in zip(*points, strict=True))
    return (left, right), (up, down)


@cache
def distance_table(shape: str) -> NDArray[np.int32]:
    """Signed distance to the outline, negative inside, in radii times `UNIT`; [TABLE * TABLE], row by row."""
    axis = (np.arange(TABLE, dtype=np.float64) - TABLE // 2) * (UNIT // CELLS)
    x, y = axis[None, :], axis[:, None]
    nearest = np.full((TABLE, TABLE), np.inf)
    inside = np.zeros((TABLE, TABLE), dtype=bool)
    for loop in polygons(shape):
        for (x0, y0), (x1, y1) in zip(loop, loop[1:] + loop[:1], strict=True):
            dx, dy = float(x1 - x0), float(y1 - y0)
            along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0.0, 1.0)
            off_x, off_y = (x - x0) - along * dx, (y - y0) - along * dy
            np.minimum(nearest, off_x * off_x + off_y * off_y, out=nearest)
            side = ((y - y0) * dx - (x - x0) * dy) * (1 if dy > 0 else -1)
            inside ^= ((y0 <= y) != (y1 <= y)) & (side > 0)  # a ray to the right crosses this edge
    distance: NDArray[np.int32] = np.rint(np.sqrt(nearest)).astype(np.int32)
    return np.where(inside, -distance, distance).ravel()
