"""The names that published scripts import from this package."""

from __future__ import annotations

from importlib import import_module

import pytest

SURFACE = {
    "mindspeed_mm.training": "pretrain get_args print_rank_0 average_losses_across_data_parallel_group unwrap_model",
    "mindspeed_mm.configs.config": "mm_extra_args_provider merge_mm_args MMConfig ConfigReader",
    "mindspeed_mm.data": "build_mm_dataset build_mm_dataloader",
    "mindspeed_mm.data.data_utils.utils": "build_iterations TextProcesser",
    "mindspeed_mm.data.data_utils.data_transform": "ResizeVideo ToTensorVideo CenterCropResizeVideo",
    "mindspeed_mm.models.common.modelzoo": "ModelHub",
    "mindspeed_mm.models.common.module": "MultiModalModule",
    "mindspeed_mm.models.transformers.base_model": """
        FSDP2Mixin WeightInitMixin get_nested_module expand_wildcard_pattern expand_range_pattern
        get_submodules_by_path initialize_fsdp2_config get_ignored_params set_recompute_modules_to_wrap
        set_fullyshard_modules_to_wrap set_modules_to_prefetch
    """,
    "mindspeed_mm.models.transformers.modelhub": "ModelHub",
    "mindspeed_mm.models.transformers_model": "TransformersModel",
    "mindspeed_mm.models.vlm_model": "VLMModel",
    "mindspeed_mm.patchs": "torch_dcp_patch ring_attn_patch ulysses_patches",
    "mindspeed_mm.tools.mem_profiler": "memory_profiler _record _dump _stop",
    "mindspeed_mm.tools.profiler": "Profiler",
}

SAME = [
    ("mindspeed_mm.models.common.modelzoo", "mindspeed_mm.models.transformers.modelhub", "ModelHub"),
    ("mindspeed_mm.training", "mindspeed_mm.arguments", "get_args"),
]


def test_published_names_can_be_imported() -> None:
    for module, names in SURFACE.items():
        exec(f"from {module} import {', '.join(names.split())}", {})  # submodules count too, as in a script


@pytest.mark.parametrize(("one", "other", "name"), SAME)
def test_one_object_under_two_paths(one: str, other: str, name: str) -> None:
    assert getattr(import_module(one), name) is getattr(import_module(other), name)
