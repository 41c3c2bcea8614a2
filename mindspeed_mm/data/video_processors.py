"""Hugging Face's video processors where torchvision is missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Of each processor the module and the class of its video processor, all of which resize with `resize` below.
_VIDEO_PROCESSORS = {
    "Qwen2VLProcessor": ("qwen2_vl", "Qwen2VLVideoProcessor"),
    "Qwen2_5_VLProcessor": ("qwen2_vl", "Qwen2VLVideoProcessor"),
    "Qwen3VLProcessor": ("qwen3_vl", "Qwen3VLVideoProcessor"),
    "Glm4vProcessor": ("glm4v", "Glm4vVideoProcessor"),
    "InternVLProcessor": ("internvl", "InternVLVideoProcessor"),
}
_MODES = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


def load_video_processor(processor_class: type, folder: str | Path) -> Any | None:
    """Return the video processor of a folder with torch doing what torchvision would do; None where there is none."""
    if processor_class.__name__ not in _VIDEO_PROCESSORS:
        return None
    module, name = _VIDEO_PROCESSORS[processor_class.__name__]
    with _torchvision_by_name():
        original = getattr(importlib.import_module(f"transformers.models.{module}.video_processing_{module}"), name)
    base = next(cls for cls in original.__mro__ if cls.__name__ == "BaseVideoProcessor")

    class TorchOnly(base):  # type: ignore[misc, valid-type]
        """The three operations for which the base class calls torchvision."""

        def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
            return video  # frames are decoded to RGB

        def resize(self, image: torch.Tensor, size: Any, resample: Any = 3, **_: Any) -> torch.Tensor:
            # What torchvision does for tensors: antialiased, on the bytes themselves.
            frames = image.reshape(-1, *image.shape[-3:])
            frames = torch.nn.functional.interpolate(
                frames, (size.height, size.width), mode=_MODES[int(resample)], align_corners=False, antialias=True
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


@contextmanager
def _torchvision_by_name() -> Iterator[None]:
    """Let a module import torchvision that only names it in annotations."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2",
             "torchvision.transforms.v2.functional"]  # fmt: skip
    for name in names:
        stand_in = ModuleType(name)
        stand_in.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = stand_in
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, stand_in)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
