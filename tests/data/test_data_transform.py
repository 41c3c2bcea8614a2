from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from mindspeed_mm.data.data_utils.data_transform import CenterCropResizeVideo, ResizeVideo, ToTensorVideo
from mindspeed_mm.errors import UserError


def clip(height: int, width: int, frames: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def test_bytes_become_fractions() -> None:
    frames = clip(2, 3)
    assert torch.equal(ToTensorVideo()(frames), frames.to(torch.float32) / 255)
    with pytest.raises(UserError, match=r"ToTensorVideo: the clip is torch\.float32"):
        ToTensorVideo()(frames.float())


@pytest.mark.parametrize(
    ("options", "source", "target"),
    [
        ({"transform_size": (6, 8)}, (9, 5), (6, 8)),
        ({"transform_size": (6, 8), "mode": "longside"}, (12, 20), (4, 8)),  # the width fills the box
        ({"transform_size": (6, 8), "mode": "longside"}, (20, 10), (6, 3)),  # the height does
        ({"transform_size": (6, 8), "mode": "shortside"}, (12, 20), (6, 10)),
        ({"transform_size": (6, 8), "mode": "shortside"}, (20, 10), (16, 8)),
        ({"transform_size": (6, 8), "mode": "shortside"}, (3, 4), (6, 8)),
        ({"transform_size": (6, 8), "mode": "shortside", "skip_low_resolution": True}, (3, 4), (3, 4)),
        ({"transform_size": {"max_hxw": 64}, "mode": "hxw"}, (8, 32), (4, 16)),
        ({"transform_size": 64, "mode": "hxw"}, (4, 4), (4, 4)),  # never enlarged
    ],
)
def test_resize(options: dict[str, Any], source: tuple[int, int], target: tuple[int, int]) -> None:
    frames = clip(*source).float()
    resized = ResizeVideo(**options)(frames)
    assert torch.equal(resized, interpolate(frames, size=target, mode="bilinear", align_corners=False))


def test_interpolation_options_are_those_of_torch() -> None:
    frames = clip(8, 8).float()
    smooth = ResizeVideo({"max_height": 3, "max_width": 4}, "bicubic", antialias=True)(frames)
    assert torch.equal(smooth, interpolate(frames, size=(3, 4), mode="bicubic", antialias=True))
    aligned = ResizeVideo((3, 4), align_corners=True)(frames)
    assert torch.equal(aligned, interpolate(frames, size=(3, 4), mode="bilinear", align_corners=True))
    assert torch.equal(ResizeVideo((4, 4), "nearest")(frames), frames[..., ::2, ::2])


@pytest.mark.parametrize(
    ("options", "source", "piece"),
    [
        ({}, (4, 12), (slice(0, 4), slice(2, 10))),  # 4 x 8 of the middle has the target's 1:2
        ({}, (12, 4), (slice(5, 7), slice(0, 4))),
        ({"top_crop": True}, (12, 4), (slice(0, 2), slice(0, 4))),
        ({"use_short_edge": True}, (4, 12), (slice(0, 4), slice(4, 8))),
    ],
)
def test_centre_crop(options: dict[str, Any], source: tuple[int, int], piece: tuple[slice, slice]) -> None:
    frames = clip(*source).float()
    cropped = CenterCropResizeVideo((3, 6), **options)(frames)
    expected = interpolate(frames[(..., *piece)], size=(3, 6), mode="bilinear", align_corners=False)
    assert torch.equal(cropped, expected)


def test_the_documented_pipeline() -> None:
    size = {"max_height": 6, "max_width": 8}
    frames = ResizeVideo(transform_size=size, interpolation_mode="bilinear", antialias=True, mode="shortside")(
        clip(12, 20)
    )
    assert frames.dtype == torch.uint8
    frames = CenterCropResizeVideo(transform_size=size, antialias=True)(ToTensorVideo()(frames))
    assert frames.shape == (2, 3, 6, 8)
    assert 0 <= frames.min() < frames.max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResizeVideo((6, 8), mode="shortsid"), "mode is 'shortsid'.*Did you mean 'shortside'"),
        (lambda: ResizeVideo("auto"), "ResizeVideo: transform_size is 'auto'"),
        (lambda: ResizeVideo((6, 8), mode="hxw"), "max_hxw"),
        (
            lambda: CenterCropResizeVideo({"max_height": 6}),
            "CenterCropResizeVideo: transform_size is {'max_height': 6}",
        ),
        (lambda: ResizeVideo((6, 8))(torch.zeros(3, 4, 4)), r"this one is \(3, 4, 4\)"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
