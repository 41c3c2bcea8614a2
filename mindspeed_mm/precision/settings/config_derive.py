"""Settings that follow from others: batch sizes, schedule lengths, number formats, sizes of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

Raw = Mapping[str, Mapping[str, Any]]
"""What each system's files say, by their own names."""


class _Setting(Protocol):
    @property
    def value(self) -> Any: ...


READ_HERE = frozenset(
    {
        "swiglu",
        "group_query_attention",
        "average_tokens_across_devices",
        "train_sampling_strategy",
        "model.loss_cfg.loss_type",
        "calculate_per_token_loss",
        "calculate_per_sample_loss",
        "calculate_square_loss",
        "calculate_token_loss",
        "model_config.multiple_of",
        "model_config.ffn_dim_multiplier",
    }
)
"""Names that no table has and the rules here read."""

Found = tuple[str, Any, str]
_ABSENT = object()


def derive(settings: Mapping[str, _Setting], raw: Raw) -> Iterator[Found]:
    """Yield ``(key, value, origin)`` for what is not set, or is "none" by the files, and follows from what is set."""
    values: dict[str, Any] = {name: setting.value for name, setting in settings.items()}
    for rule in (_model, _order, _layout, _batches, _duration, _schedule, _clipping, _formats, _loss):
        for key, value in rule(_Known(values), raw):
            if value is not None and values.get(key, _ABSENT) in (None, _ABSENT):
                values[key] = value
                yield key, value, "derived"


class _Known(dict[str, Any]):
    """Values by key; arithmetic with one that is missing gives None."""

    def __missing__(self, key: str) -> None:
        return None

    def apply(self, function: Callable[..., Any], *names: str) -> Any:
        """Return ``function`` of the named values, None if one is missing or not a number."""
        values = [self[name] for name in names]
        return function(*values) if all(isinstance(value, float) and value > 0 for value in values) else None


def is_on(values: Mapping[str, Any], name: str) -> bool:
    """Return whether a switch is set, by a bare flag or a value."""
    found = values.get(name, False)
    word = found[0] if isinstance(found, list) and found else found
    return found == [] or str(word).lower() in ("true", "1")


def _model(known: _Known, raw: Raw) -> Iterator[tuple[str, Any]]:
    yield "head_dim", known.apply(lambda hidden, heads: hidden / heads, "hidden_size", "num_attention_heads")
    yield "num_query_groups", known["num_attention_heads"]
    config, mindspore = raw.get("config", {}), raw.get("mindspore", {})
    names = {name.removeprefix("model_config.") for name in (*config, *mindspore)}
    if config or mindspore:
        yield "normalization", "rmsnorm" if "rms_norm_eps" in names else None
        yield "normalization", "layernorm" if names & {"layer_norm_eps", "layer_norm_epsilon"} else None
        yield "position_embedding", "rope" if names & {"rope_theta", "rope_parameters.rope_theta", "theta"} else None
    hidden = known["hidden_size"]
    if "megatron" in raw and hidden:
        gated = is_on(raw["megatron"], "swiglu")
        yield "activation", "swiglu" if gated else "gelu"
        yield "ffn_hidden_size", float(int(4 * hidden * 2 / 3 / 64) * 64) if gated else 4 * hidden
    if (multiple := mindspore.get("model_config.multiple_of")) and hidden:
        factor = mindspore.get("model_config.ffn_dim_multiplier")
        width = int(2 * (int((factor + 0.01) * 4 * hidden) if factor else 4 * hidden) / 3)
        yield "ffn_hidden_size", float(math.ceil(width / multiple) * multiple)


def _order(known: _Known, raw: Raw) -> Iterator[tuple[str, Any]]:
    if "hf" in raw:
        yield "shuffled", str(raw["hf"].get("train_sampling_strategy", "random")) != "sequential"


def _layout(known: _Known, raw: Raw) -> Iterator[tuple[str, Any]]:
    nodes = known["nodes"] or 1.0
    yield "world_size", known.apply(lambda each: each * nodes, "processes_per_node")
    split = (known["tensor_parallel_size"] or 1) * (known["pipeline_parallel_size"] or 1)
    split *= known["context_parallel_size"] or 1
    if "torchtitan" in raw:
        replicas = known["data_replicate_size"] or 1
        yield "data_parallel_size", known.apply(lambda shards: shards * replicas, "data_shard_size")
    yield "data_parallel_size", known.apply(lambda world: world / split, "world_size")
    yield "world_size", known.apply(lambda dp: dp * split, "data_parallel_size")


def _batches(known: _Known, raw: Raw) -> Iterator[tuple[str, Any]]:
    micro, accumulated, copies = "micro_batch_size", "gradient_accumulation_steps", "data_parallel_size"
    more = 1.0
    if "mindspore" in raw:
        more = (known["pipeline_micro_batches"] or 1) if (known["pipeline_parallel_size"] or 1) > 1 else 1.0
        more *= known["batch_interleaving"] or 1
    yield "global_batch_size", known.apply(lambda m, a, c: m * a * c * more, micro, accumulated, copies)
    yield accumulated, known.apply(lambda g, m, c: g / m / c, "global_batch_size", micro, copies)
    yield copies, known.apply(lambda g, m, a: g / m / a, "global_batch_size", micro, accumulated)
    if "torchtitan" in raw or "megatron" in raw:  # without a global size there is no accumulation
        yield "global_batch_size", known.apply(lambda m, c: m * c, micro, copies)


def _duration(known: _Known, raw: Raw) -> Iterator[tuple[str, Any]]:
    for steps, samples in (
        ("train_steps", "train_samples"),
        ("decay_steps", "decay_samples"),
        ("warmup_steps", "warmup_samples"),
    ):
        yield steps, known.apply(lambda n, batch: n / batch, samples, "global_batch_size")


def _schedule(known: _Known, raw: Raw) -> Iterator[tuple[str, Any]]:
    total = known["train_steps"]
    if known["lr_schedule"] not in (None, "constant"):
        yield "decay_steps", total
    fraction = known["warmup_fraction"]
    length = known["decay_steps"] or total
    if fraction is not None and length:
        yield "warmup_steps", float(math.ceil(fraction * length)) if "hf" in raw else fraction * length
    if known["warmup_steps"] is not None and length:
        yield "warmup_fraction", known["warmup_steps"] / length
    yield "min_learning_rate", known.apply(lambda lr, ratio: lr * ratio, "learning_rate", "min_lr_ratio")
    yield "min_lr_ratio", known.apply(lambda low, lr: low / lr, "min_learning_rate", "learning_rate")
    shape = str(raw.get("hf", {}).get("lr_scheduler_type", "linear")).rpartition(".")[2].lower()
    to_zero = "hf" in raw and shape in ("linear", "cosine", "constant", "constant_with_warmup")
    if to_zero or ("torchtitan" in raw and not known["min_lr_ratio"]):
        yield "min_learning_rate", 0.0
    final = known.apply(lambda ratio, steps: round(ratio * steps), "final_decay_ratio", "train_steps")
    yield "final_decay_steps", final


def _clipping(known: _Known, raw: Raw) -> Iterator[tuple[str, Any]]:
    if "mindspore" in raw:
        yield "clip_grad", (known["clip_grad"] or 1.0) if known["clip_grad_on"] else 0.0


def _formats(known: _Known, raw: Raw) -> Iterator[tuple[str, Any]]:
    flags = raw.keys() & {"ours", "megatron", "hf", "deepspeed"}
    short = "bfloat16" if known["bf16"] else "float16" if known["fp16"] else None
    if flags:
        yield "compute_dtype", short or "float32"
    if "megatron" in raw or "ours" in raw:
        wide = known["grads_reduced_in_fp32"] or (known["bf16"] and not known["grads_reduced_in_bf16"])
        yield "grad_reduce_dtype", "float32" if wide or not short else short
    if "deepspeed" in raw:  # in the type that the parameters compute in
        yield "grad_reduce_dtype", short or "float32"
    if "mindspore" in raw:  # communicated in the type of the weights
        yield "grad_reduce_dtype", known["parameter_dtype"]


def _loss(known: _Known, raw: Raw) -> Iterator[tuple[str, Any]]:
    for system in ("ours", "megatron"):
        if system in raw:
            by = {"token": "calculate_per_token_loss", "sample": "calculate_per_sample_loss"}
            by["square_root"] = "calculate_square_loss"
            chosen = str(raw[system].get("model.loss_cfg.loss_type", "default"))
            yield "loss_reduction", {"per_token_loss": "token", "per_sample_loss": "sample"}.get(chosen)
            yield "loss_reduction", next((how for how, flag in by.items() if is_on(raw[system], flag)), "micro_batch")
    # Trainer counts the tokens of the global batch only for classes that take their number: those without a tower.
    if "hf" in raw and not any(name.startswith("vision_config.") for name in raw.get("config", ())):
        whole = raw["hf"].get("average_tokens_across_devices", True)
        yield "loss_reduction", "token" if str(whole).lower() not in ("false", "['false']") else "token_of_rank"
