"""The frames of a video that its model is to see."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from mindspeed_mm.data.images import blank_image, bring_between
from mindspeed_mm.data.quarantine import BadSample
from mindspeed_mm.errors import UserError
from mindspeed_mm.extras import import_extra

_PICTURES = (".gif", ".webp", ".apng", ".png")


@dataclass(frozen=True)
class VideoLimits:
    """How much of a video to take; names are those of data.json without ``video_``."""

    fps: float = 2.0
    maxlen: int = 128
    max_pixels: int = 256 * 256
    min_pixels: int = 16 * 16


def load_video(
    path: str, where: str, processor: Any, limits: VideoLimits, blank: bool = False
) -> tuple[np.ndarray, Any]:
    """Decode the frames of a video that its model is to see.

    The model's video processor chooses them, at ``limits.fps`` frames per second; where it chooses more than
    ``limits.maxlen``, that many at equal distances are taken instead.

    Args:
        path: absolute path; animated pictures are read by Pillow, all else by PyAV.
        where: names the row in errors.
        processor: the model's video processor.
        limits: how many frames, and how large.
        blank: decode nothing and return black frames of the same size.

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
            indices = _choose(metadata, processor, where, path, limits.fps)
            if len(indices) > limits.maxlen:
                indices = np.linspace(0, metadata.total_num_frames - 1, limits.maxlen).round().astype(int).tolist()
            size = metadata.width, metadata.height
            taken = [blank_image(size)] * len(indices) if blank else video.frames(indices)
            frames = [bring_between(frame, limits.min_pixels, limits.max_pixels) for frame in taken]
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


def _choose(metadata: Any, processor: Any, where: str, path: str, fps: float) -> list[int]:
    try:
        return np.asarray(processor.sample_frames(metadata=metadata, fps=fps)).tolist()
    except ValueError:  # a formula that wants more frames than there are
        return list(range(metadata.total_num_frames))
    except ZeroDivisionError:  # a formula that has rounded the number of frames to 0
        raise BadSample(
            where,
            f"video {path} of {metadata.duration:.2f} seconds is too short for {fps:g} frames per second; raise "
            "preprocess_parameters.video_fps, or remove the row",
        ) from None


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
