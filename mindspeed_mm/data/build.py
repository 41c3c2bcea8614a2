"""Build the data set and the loader that data.json describes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import default_collate

from mindspeed_mm import accelerator
from mindspeed_mm.data.cache_key import cache_root
from mindspeed_mm.data.collators import COLLATORS, OTHER_DATA, PackCollator, PaddingCollator
from mindspeed_mm.data.conversations import iterate_conversations, read_conversations
from mindspeed_mm.data.datasets import ConversationDataset
from mindspeed_mm.data.encoding import ConversationEncoder, EncodingOptions
from mindspeed_mm.data.formats import find_format, read_document
from mindspeed_mm.data.keys import check_dataloader_keys, check_dataset_keys, wants_packing
from mindspeed_mm.data.loaders import MultiModalDataLoader
from mindspeed_mm.data.mixing import MixedDataset
from mindspeed_mm.data.model_inputs import ModelInputs
from mindspeed_mm.data.multimodal import as_huggingface
from mindspeed_mm.data.planning import build_sampler
from mindspeed_mm.data.quarantine import Quarantine
from mindspeed_mm.data.rows import RowFiles
from mindspeed_mm.data.sample_cache import SampleCache
from mindspeed_mm.data.streaming import ConversationStream, Source, as_stream
from mindspeed_mm.data.templates import resolve_template
from mindspeed_mm.data.video import VideoLimits
from mindspeed_mm.errors import UserError, did_you_mean


def build_mm_dataset(dataset_param: Any) -> Any:
    """Build the data set of ``dataset_param``.

    All rows are read and checked at once (columns, roles, placeholders, existence of images), so that a mistake ends
    the run before its first step. Images are decoded and prompts rendered when a sample is fetched.

    Args:
        dataset_param: the object of data.json, typed or as a dict.

    Returns:
        The training set (a ``ConversationDataset``, a ``MixedDataset`` of several or a ``ConversationStream``), or
        ``(training, validation)`` where ``val_dataset`` is given; validation is a dict where that
        names several sets.

    Raises:
        UserError: a key, a file, a row or the processor's folder is not usable.
    """
    from mindspeed_mm.configs.data import MixtureSource

    param = _typed(dataset_param, "dataset_param")
    if param.dataset_type == "multimodal":
        param = as_huggingface(param)
    check_dataset_keys(param)
    basic, preprocess, attr = param.basic_parameters, param.preprocess_parameters, param.attr
    for key, value in (("basic_parameters.dataset", basic.dataset or basic.mixture),
                       ("preprocess_parameters.model_name_or_path", preprocess.model_name_or_path)):  # fmt: skip
        if not value:
            raise UserError(f"data.json: dataset_param.{key} is required; set it to a path")

    chat_template, may_think = resolve_template(basic.template)
    read = read_document if attr.pretrain else find_format(attr.formatting)
    keep_bad = _keeps_bad(param)
    embedded = cache_root(basic.cache_dir) / "media"

    options = EncodingOptions(
        folder=preprocess.model_name_or_path,
        trust_remote_code=preprocess.trust_remote_code,
        chat_template=chat_template,
        enable_thinking=basic.enable_thinking and may_think,
        seq_length=basic.seq_length,
        train_on_prompt=basic.train_on_prompt,
        mask_history=basic.mask_history,
        image_max_pixels=preprocess.image_max_pixels,
        image_min_pixels=preprocess.image_min_pixels,
        video=VideoLimits(
            fps=preprocess.video_fps,
            maxlen=preprocess.video_maxlen,
            max_pixels=preprocess.video_max_pixels,
            min_pixels=preprocess.video_min_pixels,
        ),
        crop_to_patches=preprocess.crop_to_patches,
        min_patches=preprocess.min_patches,
        max_patches=preprocess.max_patches,
        packing=wants_packing(param),
    )

    def conversations(
        paths: str, max_samples: int | None, folder: str = basic.dataset_dir
    ) -> tuple[Any, RowFiles, SampleCache]:
        files = _files(paths)
        cache = SampleCache(param, options, files.paths, read, folder, max_samples)
        rows = cache.rows(lambda: read_conversations(files, read, attr, folder, max_samples, keep_bad, embedded))
        return rows, files, cache

    named = basic.val_dataset if isinstance(basic.val_dataset, Mapping) else {"": basic.val_dataset}
    tables = {name: conversations(paths, basic.val_max_samples) for name, paths in named.items() if paths}
    mixture = basic.mixture or [MixtureSource(dataset=basic.dataset, max_samples=basic.max_samples)]
    folders = [one.dataset_dir or basic.dataset_dir for one in mixture]
    trained = []
    if not basic.streaming:
        trained = [
            conversations(one.dataset, one.max_samples, folder) for one, folder in zip(mixture, folders, strict=True)
        ]
    if not attr.pretrain and attr.formatting in ("sharegpt", "alpaca"):
        _check_columns(attr, [_files(one.dataset) for one in mixture])
    encoder = ConversationEncoder(options)
    quarantine = None
    if keep_bad:
        count = sum(len(rows) for rows, _, _ in (*trained, *tables.values()))
        quarantine = Quarantine(param.quarantine_folder, param.bad_sample_budget, count)

    def conversation_set(rows: Any, files: RowFiles, cache: SampleCache) -> ConversationDataset:
        return ConversationDataset(rows, files, encoder, quarantine, cache)

    train = [conversation_set(*table) for table in trained]
    valid = {name: conversation_set(*table) for name, table in tables.items()}
    if quarantine is not None:
        quarantine.add(bad for dataset in (*train, *valid.values()) for bad in dataset.bad_rows())
    if basic.streaming:
        rows_of = partial(iterate_conversations, read=read, attr=attr, keep_bad=keep_bad, embedded=embedded)
        training: Any = ConversationStream(
            [
                Source(_files(one.dataset), partial(rows_of, media_folder=folder), int(one.repeat_time), one.weight)
                for one, folder in zip(mixture, folders, strict=True)
            ],
            encoder,
            quarantine,
        )
    elif basic.mixture:
        weights = None if mixture[0].weight is None else [one.weight for one in mixture]
        training = MixedDataset(train, [one.repeat_time for one in mixture], weights)
    else:
        (training,) = train
    return (training, valid.get("", valid)) if valid else training


def _check_columns(attr: Any, training: Sequence[RowFiles]) -> None:
    """Refuse the name of a column that no row has; the rows of one file, or some rows, may well be without it."""
    for key in ("system", "tools"):
        name = getattr(attr, key)
        if name is None or any(name in row for files in training for _, _, row in files if isinstance(row, dict)):
            continue
        first = next((row for files in training for _, _, row in files if isinstance(row, dict)), {})
        raise UserError(
            f"data.json: dataset_param.attr.{key}: no row has a column {name!r}; the first has "
            f"{', '.join(map(repr, first)):.200}.{did_you_mean(name, first)} Set it to null if there is none."
        )


def _files(paths: str) -> RowFiles:
    return RowFiles([Path(path) for path in paths.split(",")])


def _keeps_bad(param: Any) -> bool:
    if param.on_bad_sample == "quarantine" and param.quarantine_folder is None:
        raise UserError(
            "data.json: dataset_param.on_bad_sample: 'quarantine' lists bad samples beside the checkpoints; "
            "pass --save, or set dataset_param.quarantine_folder"
        )
    return param.on_bad_sample == "quarantine"


def build_mm_dataloader(
    dataset: Any,
    dataloader_param: Any,
    process_group: dist.ProcessGroup | None = None,
    consumed_samples: int = 0,
    dataset_param: Any = None,
) -> MultiModalDataLoader:
    """Build the loader of one rank.

    Args:
        dataset: of ``build_mm_dataset``, any map-style data set, or an ``IterableDataset`` of ``datasets``.
        dataloader_param: the object of data.json, typed or as a dict.
        process_group: the data-parallel group; by default all ranks, or this process alone.
        consumed_samples: samples (packed: sequences) that the group has already trained on, where no checkpoint has the
            position: one that does overrides it.
        dataset_param: accepted for compatibility, not needed.

    Returns:
        A loader of micro batches. ``loader.batch_sampler.set_epoch`` decides the order of the next epoch.

    Raises:
        UserError: a key is not usable, or the data set is too small for one batch.
    """
    param = _typed(dataloader_param, "dataloader_param")
    check_dataloader_keys(param)
    if getattr(getattr(dataset, "cache", None), "keep_samples", False):
        dataset.sizes  # noqa: B018 - samples are kept when their sizes are found
    dataset = as_stream(dataset)
    grouped = dist.is_initialized()
    sampler = build_sampler(
        dataset,
        param,
        rank=dist.get_rank(process_group) if grouped else 0,
        ranks=dist.get_world_size(process_group) if grouped else 1,
        consumed_samples=consumed_samples,
        pack_to=dataset.encoder.options.pack_to if hasattr(dataset, "encoder") else None,
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
        pin_memory=param.pin_memory is not False and accelerator.wants_pinned_memory(),
        persistent_workers=persistent,
        prefetch_factor=param.prefetch_factor if workers else None,
    )


def _collator(dataset: Any, param: Any) -> Any:
    name = param.model_name
    if name is not None and name not in COLLATORS:
        why = f"this version trains on no {OTHER_DATA[name]}" if name in OTHER_DATA else "it is not known"
        raise UserError(
            f"data.json: dataloader_param.collate_param.model_name: {name!r} is not available, because {why}; "
            f"leave it out or use one of {', '.join(COLLATORS)}.{did_you_mean(name, COLLATORS)}"
        )
    encoder = getattr(dataset, "encoder", None)
    if encoder is None and name is None:
        return getattr(dataset, "collate_fn", None) or default_collate
    pad_id = param.pad_id
    if pad_id is None and encoder is not None:
        tokenizer = encoder.tokenizer
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise UserError("data.json: dataloader_param.collate_param.pad_id is required: the tokenizer has no pad token")
    options = encoder.options if encoder is not None else None
    inputs = None
    if options and (Path(options.folder) / "config.json").is_file():
        inputs = ModelInputs(options.folder, options.trust_remote_code)
    if options and options.pack_to:
        if inputs is None:
            raise UserError(
                "data.json: packing: preprocess_parameters.model_name_or_path has no config.json, which says how the "
                "model counts positions; set it to the folder of the whole model"
            )
        return PackCollator(options.pack_to, pad_id, inputs)
    return PaddingCollator(pad_id, param.pad_to_multiple_of, param.ignore_pad_token_for_loss, inputs)


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
