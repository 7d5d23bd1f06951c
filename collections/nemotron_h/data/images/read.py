"""Read image files of any origin as RGB, or say in one sentence why one is refused.

Converted: EXIF's rotation is applied, transparency lies on white, grey, palettes, CMYK and 16 bits become 8-bit RGB, an
animation is its first frame. Refused: what is no image of `FORMATS`, is damaged, has several pages, has samples of an
unknown range, is far longer than wide, or would take more memory than an image may.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: read by Pillow's own decoders; others of it start programs (EPS), or are formats of nothing but icons and textures
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
#: ours: of a file; of a decoded image, which is 201 MB; and how many times as long as wide it may be
MOST_BYTES, MOST_PIXELS, MOST_RATIO = 64 << 20, 1 << 26, 100
#: what decoders log of damage says no file: the error that is raised here does
logging.getLogger("PIL").addHandler(logging.NullHandler())
_ALPHA = ("RGBA", "LA", "PA", "RGBa")


class ImageError(ValueError):
    """Reason why an image cannot be used; whoever reads it adds which one."""


def read_bytes(path: str, begin: int = 0, size: int | None = None) -> bytes:
    """Return the content of an image file, or so many bytes of an archive from a position on.

    Errors:
        ImageError: there is no such file, it is no regular one, cannot be read, or is larger than an image may be.
    """
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise ImageError("not a regular file")
        if (state.st_size if size is None else size) > MOST_BYTES:
            raise ImageError(f"over {MOST_BYTES >> 20} MiB")
        with open(path, "rb") as file:
            file.seek(begin)
            return file.read(MOST_BYTES if size is None else size)
    except FileNotFoundError as error:
        raise ImageError("there is no such file") from error
    except (OSError, ValueError) as error:  # a zero byte in the path
        raise error if isinstance(error, ImageError) else ImageError(f"cannot be read: {error}") from error


def read_image(data: bytes) -> Image.Image:
    """Return an encoded image as 8-bit RGB, upright.

    Errors:
        ImageError: see the head of this file; no pixel is decoded before the limits are checked.
    """
    if not data:
        raise ImageError("the file is empty")
    if len(data) > MOST_BYTES:
        raise ImageError(f"over {MOST_BYTES >> 20} MiB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is checked here, or of odd metadata
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check(image)
                image.load()
                return _rgb(_upright(image))
        except ImageError:
            raise
        except UnidentifiedImageError as error:
            raise ImageError(f"not an image of {', '.join(FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise ImageError(f"over {MOST_PIXELS:,} pixels") from error
        except Exception as error:  # decoders raise any: OSError, SyntaxError, struct.error, IndexError, ...
            raise ImageError(f"damaged: {type(error).__name__}: {error}"[:200]) from error


def _check(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise ImageError(f"{width} x {height} pixels: it is empty")
    if width * height > MOST_PIXELS:
        raise ImageError(f"{width:,} x {height:,} pixels: over {MOST_PIXELS:,}")
    if max(width, height) > MOST_RATIO * min(width, height):
        raise ImageError(f"{width:,} x {height:,} pixels: over {MOST_RATIO} times as long as wide")
    if image.format == "TIFF" and image.n_frames > 1:
        raise ImageError(f"a document of {image.n_frames} pages: write each as an image")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the rotation that EXIF states; metadata that cannot be read states none."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of damaged metadata; the pixels are whole
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(f"samples of 32 bits (mode {image.mode}), whose range is not known: write it with 8 or 16")
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
