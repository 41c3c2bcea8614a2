"""Find and decode pictures, with Pillow."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError


def locate_image(path: str, folder: str | Path, where: str) -> str:
    """Return the absolute path of an image of a row.

    ``path`` is looked for under ``folder``, then (published data sets write such paths) as it stands. In both cases
    the file must lie inside ``folder``; links inside the folder may lead out of it.

    Args:
        path: as the row has it.
        folder: ``basic_parameters.dataset_dir``.
        where: names the row in errors.

    Raises:
        UserError: the file does not exist, or the path leads out of the folder.
    """
    root = os.path.abspath(folder)
    inside = False
    for candidate in (os.path.join(root, path), path):
        candidate = os.path.abspath(candidate)
        if candidate.startswith(os.path.join(root, "")):
            inside = True
            if os.path.isfile(candidate):
                return candidate
    if not inside:
        raise UserError(
            f"{where}: image {path!r} is outside the data folder {root}; "
            "move it inside, or set basic_parameters.dataset_dir to a folder that holds all images"
        )
    raise UserError(f"{where}: image {path!r} not found in {root}; check the path and basic_parameters.dataset_dir")


def load_image(path: str, where: str, max_pixels: int, min_pixels: int) -> Any:
    """Decode an image to RGB and bring its area between ``min_pixels`` and ``max_pixels``.

    The aspect ratio is kept and neighbours are not mixed (nearest), as published for these two keys. EXIF rotation
    is not applied, as Hugging Face processors do not apply it.

    Args:
        path: absolute path.
        where: names the row in errors.
        max_pixels: width times height above which the image is scaled down.
        min_pixels: width times height below which the image is scaled up.

    Returns:
        A ``PIL.Image.Image`` of mode RGB.

    Raises:
        UserError: not an image, truncated, or so large that decoding it is a risk.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            width, height = file.size
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise UserError(
                    f"{where}: image {path} has {width}x{height} pixels, over the limit of {limit}; shrink it"
                )
            image = file.convert("RGB")
    except UnidentifiedImageError:
        raise UserError(f"{where}: {path} is not an image that Pillow can read; replace the file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: image {path} cannot be decoded: {error}; replace the file") from error

    area = width * height
    scale = math.sqrt(max_pixels / area) if area > max_pixels else math.sqrt(min_pixels / area)
    if area > max_pixels or area < min_pixels:
        size = max(1, int(width * scale)), max(1, int(height * scale))
        image = image.resize(size, resample=Image.Resampling.NEAREST)
    return image
