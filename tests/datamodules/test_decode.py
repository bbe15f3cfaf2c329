import io
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from datamodules.decode import BadImageError, any_pixels, decode_image, read_jpeg_header
from tests.datamodules.deep_images import npy, png, tiff, tiff_pages, values


def photograph(height=40, width=60, channels=3) -> Image.Image:
    """Smooth, so that JPEG keeps it nearly."""
    y, x = np.mgrid[:height, :width]
    planes = [128 + 100 * np.sin(x / 9 + k) * np.cos(y / (7 + k)) for k in range(channels)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8).squeeze())


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def as_array(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy().astype(int)


def reference(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_as_pillow_decodes_it(subsampling, progressive):
    data = encode(photograph(), "JPEG", quality=95, subsampling=subsampling, progressive=progressive)
    assert np.abs(as_array(decode_image(data, "jpg")) - reference(data)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr"])
def test_jpeg_modes(mode):
    data = encode(photograph().convert(mode), "JPEG", quality=95)
    assert np.abs(as_array(decode_image(data, "jpeg")) - reference(data)).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes(mode):
    image = photograph().convert("RGBA")
    image.putalpha(photograph(channels=1))
    data = encode(image.convert(mode), "PNG")
    assert (as_array(decode_image(data, "png")) == reference(data)).all()


def test_palette_with_transparent_colour_gives_no_warning():
    image = photograph().convert("P")
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_array(decode_image(encode(image, "PNG"), "png")).shape == (40, 60, 3)


def test_sixteen_bit_grey_is_scaled():
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    data = encode(Image.fromarray(values), "PNG")
    assert (as_array(decode_image(data, "png")) == (values >> 8)[..., None]).all()
    assert (reference(data) != (values >> 8)[..., None]).any(), "Pillow's own conversion saturates: the case is real"


def test_floating_point_tiff_is_refused():
    data = encode(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(BadImageError, match="fixed range"):
        decode_image(data, "tif")


@pytest.mark.parametrize(("format", "extension"), [("WEBP", "webp"), ("GIF", "gif"), ("PNG", "png")])
def test_animations_give_their_first_frame(format, extension):
    frames = [photograph(), ImageOps.invert(photograph())]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert (as_array(decode_image(data, extension)) == reference(data)).all()
    assert np.abs(as_array(decode_image(data, extension)) - np.asarray(frames[0]).astype(int)).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    data = encode(photograph(), format, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright.size == ((60, 40) if orientation < 5 else (40, 60))
    assert np.abs(as_array(decode_image(data, format.lower())) - np.asarray(upright).astype(int)).max() <= 2


def test_content_decides_among_known_formats():
    data = encode(photograph(), "PNG")
    assert (as_array(decode_image(data, "jpg")) == reference(data)).all()  # ImageNet's n02105855_2933.JPEG is a PNG


def test_bytes_and_bytearray_alike_and_no_warning():
    data = encode(photograph(), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode_image(data, "jpg"), decode_image(bytearray(data), "jpg"))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IHDR" + header
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    data = zlib.compress(bytes(1000))
    image = b"IDAT" + data
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data)) + image + struct.pack(">I", zlib.crc32(image))


def jpeg_bomb() -> bytes:
    data = encode(photograph(), "JPEG")
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", 60_000, 60_000) + data[at + 9 :]


@pytest.mark.parametrize(
    ("data", "extension"),
    [(png_header(60_000, 60_000), "png"), (png_header(12_000, 9_000), "png"), (jpeg_bomb(), "jpg")],
)
def test_bombs_are_refused_before_they_cost_memory(data, extension):
    with pytest.raises(BadImageError, match=r"pixels|[Bb]omb"):
        decode_image(data, extension)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"this is a text that was named .jpg", "known format"),
        (b"\xff\xd8", "known format"),
        (b"\xff\xd8\xff\xe0", "."),
        (b"%PDF-1.4 something", "known format"),
        (encode(photograph(), "JPEG")[:400], "[Tt]runcated"),
        (encode(photograph(), "PNG")[:300], "."),
        (encode(photograph(), "JPEG")[:200] + bytes(2000), "."),
    ],
)
def test_damaged_data_has_one_line_that_says_why(data, message):
    with pytest.raises(BadImageError, match=message) as caught:
        decode_image(data, "jpg")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("extension", ["pyd", "pth", "pickle", "npz", "txt", "mask.png", "JPG", "eps", "svg"])
def test_other_extensions_are_never_decoded(extension):
    with pytest.raises(BadImageError, match="not an image extension"):
        decode_image(encode(photograph(), "JPEG"), extension)


def test_formats_outside_of_the_whitelist_are_not_opened():
    with pytest.raises(BadImageError):
        decode_image(encode(photograph(), "EPS"), "png")


def test_random_damage_never_gives_another_exception():
    data = bytearray(encode(photograph(), "JPEG", exif=Image.Exif()))
    generator = np.random.default_rng(0)
    bad = 0
    for _ in range(300):
        hurt = bytearray(data)
        for at in generator.integers(0, len(data), 3):
            hurt[at] = generator.integers(256)
        try:
            assert decode_image(hurt, "jpg").shape[0] == 3
        except BadImageError:
            bad += 1
    assert 0 < bad < 300


def test_jpeg_header():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_jpeg_header(encode(photograph(), "JPEG")) == (40, 60, 3, False)
    assert read_jpeg_header(encode(photograph(channels=1), "JPEG", exif=exif)) == (40, 60, 1, True)
    assert read_jpeg_header(encode(photograph(), "PNG")) is None
    padded = encode(photograph(), "JPEG")
    assert read_jpeg_header(padded[:2] + b"\xff\xff" + padded[2:]) == (40, 60, 3, False)


@pytest.mark.parametrize("filler", [b"\xff", b"\xff\xd0", b"\xff\xe0\x00\x02"], ids=["padding", "bare", "empty"])
def test_megabytes_before_a_jpegs_image_are_not_walked_through(filler):
    data = b"\xff\xd8" + filler * 2_000_000
    began = time.monotonic()
    for read in (decode_image, any_pixels):
        with pytest.raises(BadImageError, match="markers and bytes of padding"):
            read(data, "jpg")
    assert time.monotonic() - began < 1


def test_sixteen_bits_keep_their_precision_in_units_of_eight():
    for c, data, extension in ((3, png, "png"), (5, tiff, "tif"), (2, npy, "npy"), (1, tiff, "tif")):
        pixels = values(c)
        image = decode_image(data(pixels), extension, c, 16)
        assert image.dtype == torch.float32 and image.permute(1, 2, 0).is_contiguous()
        assert image.min() >= 0 and image.max() <= 255
        assert np.array_equal((image * 257).round().int().permute(1, 2, 0).numpy(), pixels)
        eight = decode_image(data(pixels), extension, c)
        assert eight.dtype == torch.uint8 and np.array_equal(eight.permute(1, 2, 0).numpy(), pixels >> 8)


def test_eight_bits_in_units_of_eight():
    data = encode(photograph(), "JPEG")
    assert torch.equal(decode_image(data, "jpg", 3, 16), decode_image(data, "jpg").float())


def test_grey_from_colour_is_pillows():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    expected = torch.from_numpy(np.asarray(image.convert("L")).copy())[None]
    assert torch.equal(decode_image(encode(image, "PNG"), "png", 1), expected)
    jpeg = encode(photograph(), "JPEG", quality=95)
    grey = np.asarray(Image.open(io.BytesIO(jpeg)).convert("L")).astype(int)
    assert np.abs(decode_image(jpeg, "jpg", 1)[0].numpy().astype(int) - grey).max() <= 2


def test_colour_from_grey_repeats():
    image = decode_image(npy(values(1, 8)), "npy", 3)
    assert image.shape == (3, 20, 30) and torch.equal(image[0], image[2])


@pytest.mark.parametrize(("mode", "channels"), [("LA", 1), ("LA", 3), ("RGBA", 1), ("RGBA", 3)])
def test_transparency_is_dropped(mode, channels):
    image = photograph().convert("RGBA")
    image.putalpha(photograph(channels=1))
    data = encode(image.convert(mode), "PNG")
    expected = Image.open(io.BytesIO(data)).convert("RGB").convert("L" if channels == 1 else "RGB")
    ours = decode_image(data, "png", channels, 16).permute(1, 2, 0).numpy().squeeze()
    assert np.array_equal(ours, np.asarray(expected))


def test_transparency_can_be_a_channel():
    image = photograph().convert("RGBA")
    assert decode_image(encode(image, "PNG"), "png", 4).shape == (4, 40, 60)


@pytest.mark.parametrize(("has", "asked"), [(3, 5), (5, 3), (4, 3), (4, 1), (2, 3), (2, 1), (1, 2), (3, 2), (3, 4)])
def test_any_other_number_of_channels_is_a_bad_image(has, asked):
    with pytest.raises(BadImageError, match=f"{has} channels of 30 x 20 pixels in the file, {asked} were asked for"):
        decode_image(npy(values(has, 8)), "npy", asked)
    if asked != 3:
        with pytest.raises(BadImageError, match=f"in the file, {asked} were asked for"):
            decode_image(tiff(values(has)), "tif", asked, 16)


def test_three_pages_are_three_channels_without_being_asked():
    pixels = values(3, 8)
    image = decode_image(tiff_pages([pixels[:, :, i] for i in range(3)]), "tif")
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
