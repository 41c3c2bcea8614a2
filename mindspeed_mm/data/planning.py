"""From the keys of ``dataloader_param`` to the sampler: in which order, in which batches, on which rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mindspeed_mm.data.batching import IndexWindows, Packs, Plan, Singles, TokenBudget
from mindspeed_mm.data.order import LengthGroups, SampleOrder
from mindspeed_mm.data.row_windows import ByLength, RowWindows
from mindspeed_mm.data.samplers import DistributedBatchSampler, Windows
from mindspeed_mm.data.streaming import is_stream
from mindspeed_mm.errors import UserError

LENGTH_GROUPED = "LengthGroupedSampler"
_PACKS = 100  # in a window of a stream, at least: one of them is half empty


def build_sampler(
    dataset: Any, param: Any, rank: int, ranks: int, consumed_samples: int = 0, pack_to: int | None = None
) -> DistributedBatchSampler:
    """Return the sampler of one rank.

    Args:
        dataset: map-style, or a stream. ``sizes``, (N, 2) tokens and image patches of every sample, is read where
            lengths decide.
        param: typed ``dataloader_param``.
        rank: of this process in the data-parallel group.
        ranks: in it.
        consumed_samples: units that all ranks together have already trained on.
        pack_to: tokens of a sequence that samples are packed into.

    Raises:
        UserError: keys contradict each other or the data set, or it is too small.
    """
    batch_size = param.batch_size or 1
    global_batch_size = param.global_batch_size or batch_size * ranks
    source = _source(dataset, param, global_batch_size, pack_to)
    least = source.at_least()
    if param.drop_last and least is not None and least < batch_size * ranks:
        raise UserError(
            f"data.json: the data set has {least} {source.about['units']}, fewer than one micro batch of all ranks "
            f"({batch_size} x {ranks}); lower --micro-batch-size or set dataloader_param.drop_last to false"
        )
    return DistributedBatchSampler(
        source,
        batch_size,
        rank,
        ranks,
        drop_last=param.drop_last,
        consumed_samples=consumed_samples,
        global_batch_size=global_batch_size,
        work=_sizes(dataset, "--use-data-balance") if param.use_data_balance else None,
    )


def _source(dataset: Any, param: Any, global_batch_size: int, pack_to: int | None) -> Windows:
    seed = param.seed or 0
    sequential = param.sampler_type == "SequentialSampler" and param.dataloader_mode == "sampler"
    shuffle = param.shuffle and not sequential
    grouped = param.group_data or (param.sampler_type == LENGTH_GROUPED and param.dataloader_mode == "sampler")
    about = {"seed": seed, "shuffle": shuffle}
    if pack_to:
        _demand_one(param, "packing", "sequences")
    elif param.max_seq_len:
        _demand_one(param, "--use-txt-dynamic-batching", "micro batches")
    if is_stream(dataset):
        for what, asked in (("--use-data-balance", param.use_data_balance), ("grouping by length", grouped)):
            if asked:
                raise UserError(f"{what} needs the length of every sample, which a stream does not tell beforehand; "
                                "set basic_parameters.streaming to false, or leave it out")  # fmt: skip
        return RowWindows(dataset, shuffle, seed, _by_length(dataset, param, pack_to))
    order: Any = SampleOrder(getattr(dataset, "shares", len(dataset)), shuffle, seed)
    if grouped:
        if not shuffle:
            raise UserError("data.json: dataloader_param: grouping by length shuffles; set shuffle to true")
        order = LengthGroups(order, _tokens(dataset, "grouping by length"), global_batch_size, seed)
        about["grouped by"] = global_batch_size
    plan: Plan = Singles()
    if pack_to:
        plan = Packs(_tokens(dataset, "packing"), pack_to)
        about["pack"] = pack_to
    elif param.max_seq_len:
        tokens = _tokens(dataset, "--use-txt-dynamic-batching")
        plan = _budget(tokens, param, getattr(dataset, "where", "sample {}".format))
        about["budget"] = _about_budget(param)
    return IndexWindows(order, len(dataset), plan, about)


def _by_length(stream: Any, param: Any, pack_to: int | None) -> ByLength | None:
    """Return how the rows of a stream are put together, None for one by one."""
    if not pack_to and not param.max_seq_len:
        return None
    if not hasattr(stream, "tokens_of"):
        raise UserError(
            f"{'packing' if pack_to else '--use-txt-dynamic-batching'} needs the length of every row: give the stream "
            "a method 'tokens_of', which returns the tokens of a row"
        )
    workers = param.num_workers or 0
    if pack_to:

        def packs(rows: list[Any], lengths: np.ndarray) -> Plan:
            return Packs(lengths, pack_to, len(lengths))

        return ByLength(packs, _PACKS * pack_to, {"units": Packs.name, "pack": pack_to}, workers)

    def budgets(rows: list[Any], lengths: np.ndarray) -> Plan:
        return _budget(lengths, param, lambda row: getattr(stream, "where", str)(rows[row]))

    return ByLength(budgets, 0, {"units": TokenBudget.name, "budget": _about_budget(param)}, workers)


def _budget(tokens: np.ndarray, param: Any, where: Callable[[int], str]) -> TokenBudget:
    if len(tokens) and tokens.max() > param.max_seq_len:
        longest = int(tokens.argmax())
        raise UserError(
            f"{where(longest)} has {tokens[longest]} tokens, more than --max-seq-len {param.max_seq_len} allows a "
            "micro batch; raise it, or lower --seq-length"
        )
    multiple = param.collate_param.pad_to_multiple_of
    return TokenBudget(tokens, param.max_seq_len, param.dynamic_batch_buffer_size, multiple)


def _about_budget(param: Any) -> str:
    return f"{param.max_seq_len} of {param.dynamic_batch_buffer_size}"


def _demand_one(param: Any, what: str, unit: str) -> None:
    if (param.batch_size or 1) != 1:
        raise UserError(
            f"{what} decides which samples go together; set --micro-batch-size 1 instead of {param.batch_size}. "
            f"--global-batch-size counts {unit} then"
        )


def _tokens(dataset: Any, what: str) -> np.ndarray:
    return _sizes(dataset, what)[:, 0]


def _sizes(dataset: Any, what: str) -> np.ndarray:
    sizes = getattr(dataset, "sizes", None)
    if sizes is None:
        raise UserError(
            f"{what} needs the length of every sample: give {type(dataset).__name__} an attribute 'sizes', an integer "
            "array of shape (samples, 2) with tokens and image patches"
        )
    if np.shape(sizes) != (len(dataset), 2):
        raise UserError(
            f"{type(dataset).__name__}.sizes has shape {np.shape(sizes)}; {what} needs ({len(dataset)}, 2): tokens and "
            "image patches of every sample"
        )
    return np.asarray(sizes)
