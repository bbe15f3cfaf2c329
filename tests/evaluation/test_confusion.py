import re

import numpy as np

from evaluation.confusion import draw_confusion


def test_every_cell_that_is_not_empty_is_drawn():
    drawn = draw_confusion(np.array([[8, 2, 0], [0, 5, 5], [0, 0, 0]]), ["ant", "<bee>", "cat"])
    assert len(re.findall("<use ", drawn)) >= 4 and "&lt;bee" in drawn and "<bee>" not in drawn
    opacity = {float(value) for value in re.findall(r"fill-opacity: ([\d.]+)", drawn)}
    assert {0.8, 0.2, 0.5} <= opacity
    assert "aria-label" in drawn


def test_names_are_left_out_where_nobody_could_read_them():
    many = [f"class{i}" for i in range(60)]
    assert "class7" not in draw_confusion(np.eye(60, dtype=np.int64), many)
