"""Build the data set and the loader that data.json describes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import default_collate

from mindspeed_mm import accelerator
from mindspeed_mm.data.collators import COLLATORS, PaddingCollator
from mindspeed_mm.data.conversations import ConversationFiles, read_conversations
from mindspeed_mm.data.datasets import ConversationDataset
from mindspeed_mm.data.encoding import ConversationEncoder, EncodingOptions
from mindspeed_mm.data.keys import check_dataloader_keys, check_dataset_keys
from mindspeed_mm.data.loaders import MultiModalDataLoader
from mindspeed_mm.data.samplers import DistributedBatchSampler
from mindspeed_mm.errors import UserError, did_you_mean


def build_mm_dataset(dataset_param: Any) -> ConversationDataset | tuple[ConversationDataset, Any]:
    """Build the data set of ``dataset_param``.

    All rows are read and checked at once (columns, roles, placeholders, existence of images), so that a mistake ends
    the run before its first step. Images are decoded and prompts rendered when a sample is fetched.

    Args:
        dataset_param: the object of data.json, typed or as a dict.

    Returns:
        The training set, or ``(training, validation)`` where ``val_dataset`` is given; validation is a dict where that
        names several sets.

    Raises:
        UserError: a key, a file, a row or the processor's folder is not usable.
    """
    param = _typed(dataset_param, "dataset_param")
    if param.dataset_type != "huggingface":
        raise UserError(
            f"data.json: dataset_param.dataset_type: {param.dataset_type!r} is not available yet; use 'huggingface'"
        )
    check_dataset_keys(param)
    basic, preprocess, attr = param.basic_parameters, param.preprocess_parameters, param.attr
    for key, value in (("basic_parameters.dataset", basic.dataset),
                       ("preprocess_parameters.model_name_or_path", preprocess.model_name_or_path)):  # fmt: skip
        if not value:
            raise UserError(f"data.json: dataset_param.{key} is required; set it to a path")

    def conversations(paths: str, max_samples: int | None) -> tuple[Any, ConversationFiles]:
        files = ConversationFiles([Path(path) for path in paths.split(",")])
        return read_conversations(files, attr, basic.dataset_dir, max_samples), files

    train = conversations(basic.dataset, basic.max_samples)
    named = basic.val_dataset if isinstance(basic.val_dataset, Mapping) else {"": basic.val_dataset}
    valid = {name: conversations(paths, basic.val_max_samples) for name, paths in named.items() if paths}
    encoder = ConversationEncoder(
        EncodingOptions(
            folder=preprocess.model_name_or_path,
            trust_remote_code=preprocess.trust_remote_code,
            enable_thinking=basic.enable_thinking,
            seq_length=basic.seq_length,
            train_on_prompt=basic.train_on_prompt,
            mask_history=basic.mask_history,
            image_max_pixels=preprocess.image_max_pixels,
            image_min_pixels=preprocess.image_min_pixels,
            crop_to_patches=preprocess.crop_to_patches,
        )
    )
    if not valid:
        return ConversationDataset(*train, encoder)
    sets = {name: ConversationDataset(*rows, encoder) for name, rows in valid.items()}
    return ConversationDataset(*train, encoder), sets.get("", sets)


def build_mm_dataloader(
    dataset: Any,
    dataloader_param: Any,
    process_group: dist.ProcessGroup | None = None,
    consumed_samples: int = 0,
    dataset_param: Any = None,
) -> MultiModalDataLoader:
    """Build the loader of one rank.

    Args:
        dataset: of ``build_mm_dataset``, or any map-style data set.
        dataloader_param: the object of data.json, typed or as a dict.
        process_group: the data-parallel group; by default all ranks, or this process alone.
        consumed_samples: samples that the group has already trained on. An iterator that sets the epoch itself, as
            ``build_iterations`` does, overrides it.
        dataset_param: accepted for compatibility, not needed.

    Returns:
        A loader of micro batches. ``loader.batch_sampler.set_epoch`` decides the order of the next epoch.

    Raises:
        UserError: a key is not usable, or the data set is too small for one batch.
    """
    param = _typed(dataloader_param, "dataloader_param")
    check_dataloader_keys(param)
    ranks = dist.get_world_size(process_group) if dist.is_initialized() else 1
    batch_size = param.batch_size or 1
    sequential = param.sampler_type == "SequentialSampler" and param.dataloader_mode == "sampler"
    sampler = DistributedBatchSampler(
        len(dataset),
        batch_size,
        rank=dist.get_rank(process_group) if dist.is_initialized() else 0,
        num_ranks=ranks,
        shuffle=param.shuffle and not sequential,
        seed=param.seed or 0,
        drop_last=param.drop_last,
        consumed_samples=consumed_samples,
    )
    if not len(sampler):
        raise UserError(
            f"data.json: the data set has {len(dataset)} samples, fewer than one micro batch of all ranks "
            f"({batch_size} x {ranks}); lower --micro-batch-size or set dataloader_param.drop_last to false"
        )
    workers = param.num_workers or 0
    if workers:
        # Tokenizers that ran before the fork warn and switch their threads off in every worker; a worker needs none.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    persistent = workers > 0 if param.persistent_workers is None else param.persistent_workers and workers > 0
    return MultiModalDataLoader(
        dataset,
        sampler,
        _collator(dataset, param.collate_param),
        num_workers=workers,
        pin_memory=param.pin_memory and accelerator.wants_pinned_memory(),
        persistent_workers=persistent,
        prefetch_factor=param.prefetch_factor if workers else None,
    )


def _collator(dataset: Any, param: Any) -> Any:
    name = param.model_name
    if name is not None and name not in COLLATORS:
        raise UserError(
            f"data.json: dataloader_param.collate_param.model_name: {name!r} is not available; "
            f"leave it out or use one of {', '.join(COLLATORS)}.{did_you_mean(name, COLLATORS)}"
        )
    if not isinstance(dataset, ConversationDataset) and name is None:
        return getattr(dataset, "collate_fn", None) or default_collate
    pad_id = param.pad_id
    if pad_id is None and isinstance(dataset, ConversationDataset):
        tokenizer = dataset.encoder.tokenizer
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise UserError("data.json: dataloader_param.collate_param.pad_id is required: the tokenizer has no pad token")
    return PaddingCollator(pad_id, param.pad_to_multiple_of, param.ignore_pad_token_for_loss)


def _typed(value: Any, section: str) -> Any:
    """Return ``value`` as the typed object of data.json, checking it if it is a dict."""
    if not isinstance(value, Mapping):
        return value
    from pydantic import ValidationError

    from mindspeed_mm.configs.data import DataConfig
    from mindspeed_mm.configs.problems import describe_problems

    document = {section: dict(value)} if section == "dataset_param" else {section: dict(value), "custom": {}}
    try:
        return getattr(DataConfig.model_validate(document), section)
    except ValidationError as error:
        raise UserError("\n".join(f"data.json: {line}" for line in describe_problems(DataConfig, error))) from None
