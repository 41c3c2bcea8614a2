"""From data.json to batches: data sets, collators, samplers and loaders."""

from mindspeed_mm.data.build import build_mm_dataloader, build_mm_dataset

__all__ = ["build_mm_dataloader", "build_mm_dataset"]
