"""A contact sheet: many small images with a line of text under each, as one picture.

Axes: b = images, c = channels, h, w = rows and columns of an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.console import one_line
from datamodules.errors import DataError
from datamodules.sidecars import cannot_write

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_SIDE, _TEXT, _GAP = 128, 16, 6
_PAPER, _INK, _FAULT = (250, 250, 248), (60, 60, 60), (200, 40, 40)


def contact_sheet(images: "Sequence[tuple[Tensor | None, str]]", columns: int = 8) -> "Image.Image":
    """Draw images [c h w], as `displayable`, with their texts; None stands for one that could not be read."""
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(images) // columns)
    size = columns * (_SIDE + _GAP) + _GAP, rows * (_SIDE + _TEXT + _GAP) + _GAP
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (pixels, text) in enumerate(images):
        left = _GAP + number % columns * (_SIDE + _GAP)
        top = _GAP + number // columns * (_SIDE + _TEXT + _GAP)
        if pixels is None:
            draw.rectangle((left, top, left + _SIDE, top + _SIDE), outline=_FAULT)
            draw.line((left, top, left + _SIDE, top + _SIDE), fill=_FAULT)
        else:
            shown = displayable(pixels[None])[0].permute(1, 2, 0)
            image = Image.fromarray(shown.numpy() if shown.shape[2] == 3 else shown[:, :, 0].numpy())
            scale = _SIDE / max(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            # Tiny images show their pixels, large ones are smoothed.
            method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
            sheet.paste(
                image.resize((width, height), method), (left + (_SIDE - width) // 2, top + (_SIDE - height) // 2)
            )
        text = one_line(text)
        while draw.textlength(text, font) > _SIDE:
            text = text[:-2].rstrip(". ") + "." if len(text) > 3 else ""
        draw.text((left, top + _SIDE + 1), text, _INK, font)
    return sheet


def displayable(images: "Tensor", like: "Tensor | None" = None) -> "Tensor":
    """Make what a screen can show: [b c h w] in 0..255 -> uint8 [b 3 h w] of the first three channels, or [b 1 h w].

    Floating point means 16 bits, of which many a camera uses a small part: each image is stretched from its darkest to
    its brightest value, or from those of `like`, [b c h w].
    """
    shown = 3 if images.shape[1] >= 3 else 1
    like = images if like is None else like
    images, like = images[:, :shown], like[:, :shown]
    if like.is_floating_point():
        low = like.amin(dim=(1, 2, 3), keepdim=True)
        high = like.amax(dim=(1, 2, 3), keepdim=True)
        images = (images - low) * (255 / (high - low).clamp(min=1e-6))
    return images.round().clamp(0, 255).byte() if images.is_floating_point() else images


def save_sheet(sheet: "Image.Image", path: Path) -> None:
    """Save as PNG. DataError when that is not possible."""
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise DataError(f"{cannot_write(path, error)} (--sheet FILE puts the contact sheet elsewhere)") from error
