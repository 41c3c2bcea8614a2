"""``args.mm``: the config files that the command line names, and what the command line decides in them."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser, Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import mindspeed_mm
from mindspeed_mm.configs.base import Config, load_config
from mindspeed_mm.configs.data import DataConfig, HuggingFaceDataset, HuggingFacePreprocess, TokenizerConfig
from mindspeed_mm.configs.freeform import FreeForm as ConfigReader
from mindspeed_mm.configs.model import LossType, ModelConfig
from mindspeed_mm.configs.tools import ToolsConfig
from mindspeed_mm.errors import UserError

__all__ = ["ConfigReader", "MMConfig", "merge_mm_args", "mm_extra_args_provider"]

DEFAULT_TOOLS = Path(mindspeed_mm.__file__).parent / "tools" / "tools.json"

_DOCUMENTS: dict[str, tuple[type[Config], str]] = {
    "data": (DataConfig, "the data: which samples, how they are prepared and batched (JSON or YAML)"),
    "model": (ModelConfig, "the model: its weights, frozen parts and loss (JSON or YAML)"),
    "tool": (ToolsConfig, "the profiler and memory snapshots (JSON or YAML); default: all of them off"),
}


class NotGivenError(UserError, AttributeError):
    """A document was read that the command line did not name. ``hasattr(args.mm, "data")`` is False then."""


class MMConfig:
    """The documents of a run: ``model``, ``data`` and ``tool``, those that were given."""

    model: ModelConfig
    data: DataConfig
    tool: ToolsConfig

    def __init__(self, **documents: Config) -> None:
        self.__dict__.update(documents)

    def __getattr__(self, name: str) -> Any:
        if name in _DOCUMENTS:
            raise NotGivenError(f"args.mm.{name} is read, but no file was given. Pass --mm-{name} <file>.")
        raise AttributeError(f"args.mm has no '{name}'; it has {', '.join(_DOCUMENTS)}")


def mm_extra_args_provider(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--mm-data``, ``--mm-model`` and ``--mm-tool`` to ``parser``, unless it has them already."""
    group = parser.add_argument_group("multimodal")
    for name, (_, content) in _DOCUMENTS.items():
        with suppress(ArgumentError):
            group.add_argument(f"--mm-{name}", type=str, default="", metavar="FILE", help=content)
    return parser


def merge_mm_args(args: Namespace) -> list[str]:
    """Load the files that ``args`` names into ``args.mm``, and fold in the flags that decide their keys.

    ``args.mm_tool`` may be empty: the packaged tools.json is read then.

    Returns:
        A line for each key of a file that the command line overrides or that has no effect, to be printed once.

    Raises:
        UserError: one for all problems of all files, or a flag contradicts a key.
    """
    paths = {name: getattr(args, f"mm_{name}", None) for name in _DOCUMENTS}
    paths["tool"] = paths["tool"] or DEFAULT_TOOLS
    documents, problems = {}, []
    for name, path in paths.items():
        try:
            if path:
                documents[name] = load_config(_DOCUMENTS[name][0], path)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    args.mm = MMConfig(**documents)
    notes = _fold_into_data(args, args.mm.data) if "data" in documents else []
    return notes + (_fold_into_model(args, args.mm.model) if "model" in documents else [])


def _fold_into_data(args: Namespace, data: DataConfig) -> list[str]:
    loader = data.dataloader_param
    decided: list[tuple[str, Config, str, str]] = [
        ("dataloader_param", loader, "batch_size", "micro_batch_size"),
        ("dataloader_param", loader, "num_workers", "num_workers"),
        ("dataloader_param", loader, "seed", "seed"),
        ("dataloader_param", loader, "global_batch_size", "global_batch_size"),
    ]
    if getattr(args, "use_txt_dynamic_batching", False):
        decided += [("dataloader_param", loader, key, key) for key in ("max_seq_len", "dynamic_batch_buffer_size")]
    loader.use_data_balance |= getattr(args, "use_data_balance", False)
    dataset = data.dataset_param
    if isinstance(dataset, HuggingFaceDataset):
        processor: HuggingFacePreprocess | TokenizerConfig = dataset.preprocess_parameters
        decided.append(("dataset_param.basic_parameters", dataset.basic_parameters, "seq_length", "seq_length"))
    elif dataset is not None:
        processor = dataset.tokenizer_config
        decided.append(("dataset_param", dataset, "seq_length", "seq_length"))
    if dataset is not None and getattr(args, "trust_remote_code", False):
        processor.trust_remote_code = True
    if dataset is not None and dataset.quarantine_folder is None:
        dataset.quarantine_folder = getattr(args, "save", None)

    notes = []
    for path, owner, key, dest in decided:
        value, written = getattr(args, dest, None), getattr(owner, key)
        if value is None:
            continue
        if written not in (None, value):
            flag = f"--{dest.replace('_', '-')}"
            notes.append(f"{args.mm_data}: {path}.{key} is {written} there; {flag} decides, {value} is used.")
        setattr(owner, key, value)
    return notes


_LOSS_FLAGS: dict[LossType, str] = {
    "per_token_loss": "calculate_per_token_loss",
    "per_sample_loss": "calculate_per_sample_loss",
}


def _fold_into_model(args: Namespace, model: ModelConfig) -> list[str]:
    if getattr(args, "trust_remote_code", False):
        model.trust_remote_code = True
    model.load_strict = model.load_strict and getattr(args, "load_strict", True)
    for loss_type, dest in _LOSS_FLAGS.items():
        if not getattr(args, dest, False):
            continue
        loss = model.loss_cfg
        if "loss_type" in loss and loss.loss_type != loss_type:
            raise UserError(
                f"{args.mm_model}: loss_cfg.loss_type is '{loss.loss_type}', but --{dest.replace('_', '-')} asks for "
                f"'{loss_type}'. Delete one of the two."
            )
        loss.loss_type = loss_type
    return [
        f"{args.mm_model}: patch.{name} has no effect: it changes the code of a trainer that is not used here."
        for name, switched_on in model.patch
        if switched_on
    ]
