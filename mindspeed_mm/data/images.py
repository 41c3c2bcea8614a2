"""Find and decode pictures, with Pillow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mindspeed_mm.data.quarantine import BadSample


def load_image(path: str, where: str, max_pixels: int, min_pixels: int) -> Any:
    """Decode an image to RGB and bring its area between ``min_pixels`` and ``max_pixels``.

    The aspect ratio is kept and neighbours are not mixed (nearest), as published for these two keys. EXIF rotation
    is not applied, as Hugging Face processors do not apply it. Of 16 bits a channel the upper 8 are taken.

    Args:
        path: absolute path.
        where: names the row in errors.
        max_pixels: width times height above which the image is scaled down.
        min_pixels: width times height below which the image is scaled up.

    Returns:
        A ``PIL.Image.Image`` of mode RGB.

    Raises:
        BadSample: not an image, truncated, or so large that decoding it is a risk.
    """
    with _opened(path, where) as file:
        image = _to_rgb(file)
    return bring_between(image, min_pixels, max_pixels)


def image_size(path: str, where: str, max_pixels: int, min_pixels: int) -> tuple[int, int]:
    """Return width and height of what `load_image` would return, from the head of the file."""
    with _opened(path, where) as file:
        return _size_between(file.size, min_pixels, max_pixels)


def blank_image(size: tuple[int, int]) -> Any:
    """Return a black ``PIL.Image.Image`` of mode RGB."""
    from PIL import Image

    return Image.new("RGB", size)


def bring_between(image: Any, min_pixels: int, max_pixels: int) -> Any:
    """Scale a ``PIL.Image.Image`` so that its area lies between the two, by the nearest pixels."""
    from PIL import Image

    size = _size_between(image.size, min_pixels, max_pixels)
    return image if size == image.size else image.resize(size, resample=Image.Resampling.NEAREST)


def _size_between(size: tuple[int, int], min_pixels: int, max_pixels: int) -> tuple[int, int]:
    width, height = size
    area = width * height
    if min_pixels <= area <= max_pixels:
        return size
    scale = math.sqrt((max_pixels if area > max_pixels else min_pixels) / area)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _to_rgb(image: Any) -> Any:
    """Convert to 8 bits a channel. Pillow would cut wider values off at 255, which makes a 16-bit picture white."""
    from PIL import Image

    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError(f"its pixels (mode {image.mode}) have no range; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16 bits, which Pillow before 11 had as I in PNG files
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def _opened(path: str, where: str) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            width, height = file.size
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise BadSample(
                    where, f"image {path} has {width}x{height} pixels, over the limit of {limit}; shrink it"
                )
            yield file
    except UnidentifiedImageError:
        raise BadSample(where, f"{path} is not an image that Pillow can read; replace the file") from None
    except BadSample:
        raise
    except Exception as error:  # a broken file makes Pillow's decoders stumble in any way
        raise BadSample(where, f"image {path} cannot be decoded: {error}; replace the file") from error
