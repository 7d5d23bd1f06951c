"""Odd and malformed images: bytes of each, and what reading it has to come to."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

#: size and colour (of every pixel, within 6 of it), or words of the reason
Outcome = tuple[tuple[int, int], tuple[int, int, int]] | str
RED, WHITE, GREY = (255, 0, 0), (255, 255, 255), (128, 128, 128)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(mode: str = "RGB", colour=RED, size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.new(mode, size, colour)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG of any header: what Pillow itself does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(plain(), "JPEG", exif=exif)


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (20, 10), 1)
    image.putpalette([0, 0, 0, *RED])
    return saved(image, transparency=1) if transparent else saved(image)


def frames(format: str) -> bytes:
    return saved(plain(), format, save_all=True, append_images=[plain(colour=WHITE)], lossless=True)


def broken(data: bytes, place: int, byte: int = 0xFF) -> bytes:
    return data[:place] + bytes([byte] * 8) + data[place + 8 :]


def noise(format: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), format)


SHAPE = (20, 10)
IMAGES: dict[str, tuple[Callable[[], bytes], Outcome]] = {
    "png": (lambda: saved(plain()), (SHAPE, RED)),
    "jpeg": (lambda: saved(plain(), "JPEG"), (SHAPE, RED)),
    "progressive jpeg": (lambda: saved(plain(), "JPEG", progressive=True), (SHAPE, RED)),
    "webp": (lambda: saved(plain(), "WEBP", lossless=True), (SHAPE, RED)),
    "bmp": (lambda: saved(plain(), "BMP"), (SHAPE, RED)),
    "ppm": (lambda: saved(plain(), "PPM"), (SHAPE, RED)),
    "tiff": (lambda: saved(plain(), "TIFF"), (SHAPE, RED)),
    "one pixel": (lambda: saved(plain(size=(1, 1))), ((1, 1), RED)),
    "grey": (lambda: saved(plain("L", 128)), (SHAPE, GREY)),
    "black and white": (lambda: saved(plain("1", 1)), (SHAPE, WHITE)),
    "grey and alpha": (lambda: saved(plain("LA", (0, 127))), (SHAPE, GREY)),
    "transparent": (lambda: saved(plain("RGBA", (0, 0, 0, 0))), (SHAPE, WHITE)),
    "half transparent": (lambda: saved(plain("RGBA", (0, 0, 0, 127))), (SHAPE, GREY)),
    "a transparent colour": (lambda: saved(plain(), transparency=RED), (SHAPE, WHITE)),
    "palette": (lambda: palette(False), (SHAPE, RED)),
    "palette with transparency": (lambda: palette(True), (SHAPE, WHITE)),
    "cmyk": (lambda: saved(plain("CMYK", (0, 255, 255, 0)), "JPEG"), (SHAPE, RED)),
    "cmyk tiff": (lambda: saved(plain("CMYK", (0, 255, 255, 0)), "TIFF"), (SHAPE, RED)),
    "ycbcr": (lambda: saved(plain().convert("YCbCr"), "TIFF"), (SHAPE, RED)),
    "lab": (lambda: saved(plain("LAB", (255, 128, 128)), "TIFF"), (SHAPE, WHITE)),
    "16 bits of grey": (
        lambda: saved(Image.fromarray(np.full((10, 20), 128 * 257, dtype=np.uint16))),
        (SHAPE, GREY),
    ),
    "16 bits of grey, tiff": (
        lambda: saved(Image.fromarray(np.full((10, 20), 128 * 257, dtype=np.uint16)), "TIFF"),
        (SHAPE, GREY),
    ),
    "16 bits of colour": (
        lambda: png(20, 10, 16, 2, 10 * (b"\0" + 20 * b"\xff\xff\x00\x00\x00\x00")),
        (SHAPE, RED),
    ),
    "32 bits": (lambda: saved(plain("I", 70000), "TIFF"), "range is not known"),
    "floats": (lambda: saved(plain("F", 0.5), "TIFF"), "range is not known"),
    "lies on its side": (lambda: turned(6), ((10, 20), RED)),
    "upside down": (lambda: turned(3), (SHAPE, RED)),
    "an orientation that is none": (lambda: turned(99), (SHAPE, RED)),
    "animated gif": (lambda: saved(plain(), "GIF", save_all=True, append_images=[plain(colour=WHITE)]), (SHAPE, RED)),
    "animated webp": (lambda: frames("WEBP"), (SHAPE, RED)),
    "animated png": (lambda: saved(plain(), save_all=True, append_images=[plain(colour=WHITE)]), (SHAPE, RED)),
    "pages": (lambda: saved(plain(), "TIFF", save_all=True, append_images=[plain()]), "a document of 2 pages"),
    "no byte": (lambda: b"", "the file is empty"),
    "a text": (lambda: b"not an image at all", "not an image of"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage", "not an image of"),
    "an icon": (lambda: saved(plain(size=(16, 16)), "ICO"), "not an image of"),
    "head alone": (lambda: saved(plain())[:20], "not an image of|damaged"),
    "truncated png": (lambda: noise("PNG")[:6000], "damaged: "),
    "truncated jpeg": (lambda: noise("JPEG")[:-2000], "damaged: .*truncated"),
    "damaged png": (lambda: broken(noise("PNG"), 4000), "damaged: "),
    "damaged header": (lambda: broken(saved(plain()), 20), "not an image of|damaged"),
    "no width": (lambda: png(0, 10), "not an image of|it is empty|damaged"),
    "bomb": (lambda: png(30_000, 30_000), r"over 67,108,864"),
    "smaller bomb": (lambda: png(9_000, 8_000), r"9,000 x 8,000 pixels: over 67,108,864"),
    "more pixels promised than there are": (lambda: png(3_000, 3_000), "damaged: "),
    "too narrow": (lambda: saved(plain(size=(1, 101))), "1 x 101 pixels: over 100 times"),
    "narrow": (lambda: saved(plain(size=(100, 1))), ((100, 1), RED)),
}
