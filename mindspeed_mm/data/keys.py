"""Documented keys of data.json that this version does not act on: harmless ones are named once, others refused."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.distributed.state import print_rank_0
from mindspeed_mm.errors import UserError

_BASIC, _PREPROCESS, _ATTR = "basic_parameters", "preprocess_parameters", "attr"

# (section, keys, why they have no effect)
_WITHOUT_EFFECT: list[tuple[str, tuple[str, ...], str]] = [
    (_BASIC, ("tool_format",), "tools are written as the model's chat template does"),
    (
        _BASIC,
        ("overwrite_cache", "preprocess_on_fly", "preprocessing_batch_size"),
        "the cache knows by content what it has; mindspeed-mm data prepare --overwrite prepares it again",
    ),
    (_PREPROCESS, ("use_fast_tokenizer",), "the fast tokenizer is always used"),
    (_PREPROCESS, ("image_resolution",), "image_max_pixels and image_min_pixels decide"),
    (_PREPROCESS, ("video_resolution",), "video_max_pixels and video_min_pixels decide"),
    (_PREPROCESS, ("audio_sampling_rate",), "the feature extractor of the model decides"),
]
_NOT_AVAILABLE: list[tuple[str, tuple[str, ...]]] = [
    (_PREPROCESS, ("split_special_tokens", "image_do_pan_and_scan", "use_audio_in_video")),
    (_ATTR, ("ranking", "chosen", "rejected")),
]
_SAMPLERS = ("stateful_distributed_sampler", "BaseRandomBatchSampler", "SequentialSampler", "LengthGroupedSampler")
_LOADER_NOT_AVAILABLE = (
    "data_sharding",
    "group_frame",
    "group_resolution",
    "priority_mode",
    "initial_global_step_for_sampler",
)


def check_dataset_keys(param: Any) -> None:
    """Refuse what would change the samples, and name once the given keys that have no effect.

    Args:
        param: typed ``dataset_param``.

    Raises:
        UserError: a key asks for something that is not available.
    """
    for section, keys in _NOT_AVAILABLE:
        for key in keys:
            if getattr(param, section).get(key):
                _refuse(f"dataset_param.{section}.{key}", getattr(getattr(param, section), key))
    basic = param.basic_parameters
    if basic.train_on_prompt and basic.mask_history:
        raise UserError(
            "data.json: dataset_param.basic_parameters: train_on_prompt and mask_history contradict each other; "
            "set one of them to false"
        )
    if basic.mixture:
        _check_mixture(param)
    if basic.streaming:
        _check_streaming(param)
    for section, keys, why in _WITHOUT_EFFECT:
        given = [key for key in keys if key in getattr(param, section)]
        if given:
            print_rank_0(f"data.json: {', '.join(given)}: no effect, because {why}")


def wants_packing(param: Any) -> bool:
    """Return whether samples are to be packed, as any of the three keys for it may ask.

    Args:
        param: typed ``dataset_param``.

    Raises:
        UserError: the keys contradict each other, or nothing says how long a sequence is.
    """
    basic = param.basic_parameters
    given = {
        "basic_parameters.packing": basic.packing,
        "basic_parameters.neat_packing": basic.neat_packing or None,
        "attr.packing": param.attr.packing,
    }
    asked = [key for key, value in given.items() if value]
    refused = [key for key, value in given.items() if value is False]
    if asked and refused:
        raise UserError(
            f"data.json: dataset_param: {asked[0]} is true and {refused[0]} is false; they mean the same, set one"
        )
    if asked and basic.seq_length is None:
        raise UserError(f"data.json: dataset_param.{asked[0]}: pass --seq-length, the tokens of a packed sequence")
    return bool(asked)


def _check_mixture(param: Any) -> None:
    basic = param.basic_parameters
    where = "data.json: dataset_param.basic_parameters.mixture"
    if basic.dataset:
        raise UserError(f"{where}: there is a 'dataset' beside it; make it an entry of the list, or remove one of them")
    if len({one.weight is None for one in basic.mixture}) > 1:
        raise UserError(f"{where}: some data sets have a weight and some have not; give it to all or to none")


def _check_streaming(param: Any) -> None:
    where = "data.json: dataset_param.basic_parameters.streaming"
    for key in ("max_samples", "val_rate"):
        if param.basic_parameters.get(key):
            raise UserError(
                f"{where}: {key} needs the number of rows, which a stream does not tell; remove one of them"
            )
    for number, one in enumerate(param.basic_parameters.mixture or []):
        entry = f"data.json: dataset_param.basic_parameters.mixture.{number}"
        if one.max_samples:
            raise UserError(f"{entry}: max_samples needs the number of rows, which a stream does not tell; remove it")
        if one.repeat_time != 1 and one.weight is not None:
            raise UserError(
                f"{entry}: with weights a stream begins anew where it ends; remove repeat_time {one.repeat_time:g}"
            )
        if one.repeat_time != int(one.repeat_time) or one.repeat_time < 1:
            raise UserError(
                f"{entry}: a stream is read a whole number of times in an epoch; round repeat_time {one.repeat_time:g}"
            )
    if param.on_bad_sample == "quarantine" and isinstance(param.bad_sample_budget, float):
        raise UserError(
            f"{where}: dataset_param.bad_sample_budget {param.bad_sample_budget} is a share of rows that nobody has "
            "counted; set it to a number of bad samples to put up with"
        )


def check_dataloader_keys(param: Any) -> None:
    """Refuse samplers and sampler options that are not available.

    Args:
        param: typed ``dataloader_param``.

    Raises:
        UserError: naming the key, its value and what to use.
    """
    if param.dataloader_mode == "variable":
        _refuse("dataloader_param.dataloader_mode", param.dataloader_mode, "use 'sampler'")
    if param.dataloader_mode == "sampler" and param.sampler_type not in _SAMPLERS:
        choices = ", ".join(map(repr, _SAMPLERS))
        _refuse("dataloader_param.sampler_type", param.sampler_type, f"use one of {choices}")
    for key in _LOADER_NOT_AVAILABLE:
        if param.get(key):
            _refuse(f"dataloader_param.{key}", getattr(param, key))


def _refuse(key: str, value: Any, advice: str = "remove the key") -> None:
    raise UserError(f"data.json: {key}: {value!r} is not available yet; {advice}")
