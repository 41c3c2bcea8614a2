"""Transforms of video clips: tensors of shape ``(T, C, H, W)``, frames first.

They are plain callables, for ``torchvision.transforms.Compose`` or any other pipeline. Sizes are ``(height, width)``
or the documented ``{"max_height": ..., "max_width": ...}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mindspeed_mm.errors import UserError, did_you_mean

Size = Mapping[str, int] | Sequence[int]

_MODES = ("resize", "longside", "shortside", "hxw")


class ToTensorVideo:
    """Turn bytes into fractions: uint8 ``[0, 255]`` becomes float32 ``[0, 1]`` of the same shape."""

    def __call__(self, clip: Tensor) -> Tensor:
        """Return the converted clip.

        Raises:
            UserError: ``clip`` is not a uint8 tensor of four dimensions.
        """
        _check_clip(self, clip)
        if clip.dtype != torch.uint8:
            raise UserError(
                f"ToTensorVideo: the clip is {clip.dtype}, not torch.uint8; it may have been scaled before."
            )
        return clip.float() / 255.0


class ResizeVideo:
    """Resize every frame.

    Args:
        transform_size: target size ``(H, W)``; for ``mode="hxw"`` the number of pixels, or ``{"max_hxw": ...}``.
        interpolation_mode: as in ``torch.nn.functional.interpolate``.
        skip_low_resolution: leave clips alone that lie within the target already (``longside``, ``shortside``).
        align_corners: as in ``interpolate``.
        antialias: as in ``interpolate``.
        mode: ``resize`` to exactly ``(H, W)``. The others keep the aspect ratio: ``longside`` makes the largest clip
            that fits into ``(H, W)``, ``shortside`` the smallest that covers it, ``hxw`` shrinks larger clips to at
            most so many pixels.

    Raises:
        UserError: ``mode`` is unknown, or ``transform_size`` does not fit it.
    """

    def __init__(
        self,
        transform_size: Size | int,
        interpolation_mode: str = "bilinear",
        skip_low_resolution: bool = False,
        align_corners: bool = False,
        antialias: bool = False,
        mode: str = "resize",
    ) -> None:
        if mode not in _MODES:
            raise UserError(
                f"ResizeVideo: mode is '{mode}'; use one of {', '.join(_MODES)}.{did_you_mean(mode, _MODES)}"
            )
        self.mode = mode
        self.size = _read_pixels(self, transform_size) if mode == "hxw" else _read_size(self, transform_size)
        self.skip_low_resolution = skip_low_resolution
        self.interpolation = _Interpolation(interpolation_mode, align_corners, antialias)

    def __call__(self, clip: Tensor) -> Tensor:
        """Return the resized clip, of the dtype of ``clip``."""
        _check_clip(self, clip)
        return self.interpolation(clip, self._target(*clip.shape[-2:]))

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, int):
            scale = min(1.0, math.sqrt(self.size / (height * width)))
            return int(height * scale), int(width * scale)
        rows, columns = self.size
        if self.mode == "resize":
            return rows, columns
        if self.skip_low_resolution and height <= rows and width <= columns:
            return height, width
        # Whole numbers, so that rounding never makes a covering clip one pixel too small.
        is_wider = width * rows > height * columns
        if is_wider == (self.mode == "shortside"):
            return rows, max(1, width * rows // height)
        return max(1, height * columns // width), columns


class CenterCropResizeVideo:
    """Cut the largest piece of the target's aspect ratio out of the middle and resize it to the target.

    Args:
        transform_size: target size ``(H, W)``.
        use_short_edge: cut out a square instead.
        top_crop: keep the upper edge, not the middle.
        interpolation_mode: as in ``torch.nn.functional.interpolate``.
        align_corners: as in ``interpolate``.
        antialias: as in ``interpolate``.

    Raises:
        UserError: ``transform_size`` is not a size.
    """

    def __init__(
        self,
        transform_size: Size,
        use_short_edge: bool = False,
        top_crop: bool = False,
        interpolation_mode: str = "bilinear",
        align_corners: bool = False,
        antialias: bool = False,
    ) -> None:
        self.size = _read_size(self, transform_size)
        self.aspect = (1, 1) if use_short_edge else self.size
        self.top_crop = top_crop
        self.interpolation = _Interpolation(interpolation_mode, align_corners, antialias)

    def __call__(self, clip: Tensor) -> Tensor:
        """Return the clip of shape ``(T, C, *transform_size)``, of the dtype of ``clip``."""
        _check_clip(self, clip)
        height, width = clip.shape[-2:]
        rows, columns = self.aspect
        kept_height = max(1, min(height, width * rows // columns))
        kept_width = max(1, min(width, height * columns // rows))
        top = 0 if self.top_crop else round((height - kept_height) / 2)
        left = round((width - kept_width) / 2)
        return self.interpolation(clip[..., top : top + kept_height, left : left + kept_width], self.size)


class _Interpolation:
    def __init__(self, mode: str, align_corners: bool, antialias: bool) -> None:
        self.options = {"mode": mode, "align_corners": align_corners or None, "antialias": antialias}

    def __call__(self, clip: Tensor, size: tuple[int, int]) -> Tensor:
        return clip if tuple(clip.shape[-2:]) == size else functional.interpolate(clip, size=size, **self.options)


def _check_clip(transform: object, clip: Tensor) -> None:
    if not isinstance(clip, Tensor) or clip.dim() != 4:
        got = tuple(clip.shape) if isinstance(clip, Tensor) else type(clip).__name__
        raise UserError(f"{type(transform).__name__}: a clip is a tensor of shape (T, C, H, W); this one is {got}.")


def _read_size(transform: object, size: object) -> tuple[int, int]:
    numbers = [size.get("max_height"), size.get("max_width")] if isinstance(size, Mapping) else size
    match numbers:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    raise UserError(
        f"{type(transform).__name__}: transform_size is {size!r}; give (height, width) or "
        '{"max_height": height, "max_width": width}, in pixels.'
    )


def _read_pixels(transform: object, size: object) -> int:
    match size.get("max_hxw") if isinstance(size, Mapping) else size:
        case int(pixels) if pixels > 0:
            return pixels
    raise UserError(
        f'{type(transform).__name__}: transform_size is {size!r}; mode "hxw" takes {{"max_hxw": height * width}}.'
    )
