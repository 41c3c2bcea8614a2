"""Frames of videos, and Hugging Face's video processors where torchvision is missing."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindspeed_mm.data.images import bring_between
from mindspeed_mm.data.quarantine import BadSample
from mindspeed_mm.errors import UserError
from mindspeed_mm.extras import import_extra

# Video processors whose module can be imported without torchvision.
_MODULES = {"Qwen3VLProcessor": "qwen3_vl", "Glm4vProcessor": "glm4v"}
_PICTURES = (".gif", ".webp", ".apng", ".png")


@dataclass(frozen=True)
class VideoLimits:
    """How much of a video to take; names are those of data.json without ``video_``."""

    fps: float = 2.0
    maxlen: int = 128
    max_pixels: int = 256 * 256
    min_pixels: int = 16 * 16


def load_video_processor(processor_class: type, folder: str | Path) -> Any | None:
    """Return the video processor of a folder with torch doing what torchvision would do; None where there is none."""
    name = _MODULES.get(processor_class.__name__)
    if name is None:
        return None
    module = importlib.import_module(f"transformers.models.{name}.video_processing_{name}")
    original = getattr(module, processor_class.__name__.replace("Processor", "VideoProcessor"))
    base = next(cls for cls in original.__mro__ if cls.__name__ == "BaseVideoProcessor")

    class TorchOnly(base):  # type: ignore[misc, valid-type]
        """The three operations for which the base class calls torchvision."""

        def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
            return video  # frames are decoded to RGB

        def resize(self, image: torch.Tensor, size: Any, resample: Any = None, **_: Any) -> torch.Tensor:
            # What torchvision does for tensors: antialiased, bicubic on the bytes themselves.
            frames = image.reshape(-1, *image.shape[-3:])
            frames = torch.nn.functional.interpolate(
                frames, (size.height, size.width), mode="bicubic", align_corners=False, antialias=True
            )
            return frames.reshape(*image.shape[:-2], size.height, size.width)

        def normalize(self, image: torch.Tensor, mean: Any, std: Any, **_: Any) -> torch.Tensor:
            mean, std = (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean, std))
            return (image - mean) / std

    processor_type: Any = type(original.__name__, (original, TorchOnly), {"__module__": original.__module__})
    try:
        return processor_type.from_pretrained(folder, local_files_only=True)
    except OSError:  # the folder does not describe one
        return None


def load_video(path: str, where: str, processor: Any, limits: VideoLimits) -> tuple[np.ndarray, Any]:
    """Decode the frames of a video that its model is to see.

    The model's video processor chooses them, at ``limits.fps`` frames per second; where it chooses more than
    ``limits.maxlen``, that many at equal distances are taken instead.

    Args:
        path: absolute path; animated pictures are read by Pillow, all else by PyAV.
        where: names the row in errors.
        processor: the model's video processor.
        limits: how many frames, and how large.

    Returns:
        The frames, uint8 of shape (T, H, W, 3), and their ``VideoMetadata``.

    Raises:
        BadSample: the file is no video that can be decoded.
        UserError: PyAV is missing.
    """
    reader = _Pictures if path.lower().endswith(_PICTURES) else _Stream
    try:
        with reader(path) as video:
            metadata = video.metadata()
            indices = np.asarray(processor.sample_frames(metadata=metadata, fps=limits.fps)).tolist()
            if len(indices) > limits.maxlen:
                indices = np.linspace(0, metadata.total_num_frames - 1, limits.maxlen).round().astype(int).tolist()
            frames = [bring_between(frame, limits.min_pixels, limits.max_pixels) for frame in video.frames(indices)]
    except UserError:
        raise
    except Exception as error:  # decoders stumble over broken files in any way
        raise BadSample(where, f"video {path} cannot be decoded: {error}; replace the file") from error
    if len(frames) != len(indices) or not frames:
        raise BadSample(
            where, f"video {path} ends after {len(frames)} of the {len(indices)} frames to take; replace it"
        )
    metadata.frames_indices = indices
    return np.stack([np.asarray(frame) for frame in frames]), metadata


def _metadata(frames: int, fps: float, size: tuple[int, int]) -> Any:
    from PIL import Image
    from transformers.video_utils import VideoMetadata

    if frames < 1:
        raise ValueError("it has no frames")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise ValueError(f"frames of {size[0]}x{size[1]} pixels are over the limit of {limit}")
    return VideoMetadata(frames, fps, size[0], size[1], duration=frames / fps)


class _Pictures:
    """An animated picture."""

    def __init__(self, path: str) -> None:
        from PIL import Image

        self._image = Image.open(path)

    def __enter__(self) -> _Pictures:
        return self

    def __exit__(self, *_: Any) -> None:
        self._image.close()

    def metadata(self) -> Any:
        frames = getattr(self._image, "n_frames", 1)
        seconds = 0.0
        for index in range(frames):
            self._image.seek(index)
            seconds += (self._image.info.get("duration") or 100) / 1000
        return _metadata(frames, frames / seconds, self._image.size)

    def frames(self, indices: list[int]) -> Any:
        for index in indices:
            self._image.seek(index)
            yield self._image.convert("RGB")


class _Stream:
    """A video file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._container = import_extra("av", "video", "a row with a video").open(path)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        self._container.close()

    def metadata(self) -> Any:
        stream = self._container.streams.video[0]
        # Some containers do not say how many frames they have: count the packets.
        frames = stream.frames or sum(packet.size > 0 for packet in self._container.demux(stream))
        return _metadata(frames, float(stream.average_rate or 24), (stream.width, stream.height))

    def frames(self, indices: list[int]) -> Any:
        self._container.seek(0)
        wanted = iter(indices)
        index = next(wanted, None)
        for number, frame in enumerate(islice(self._container.decode(video=0), indices[-1] + 1)):
            while index == number:
                yield frame.to_image()
                index = next(wanted, None)
