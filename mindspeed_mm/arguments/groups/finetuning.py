"""Adapters, preference training and the search for a parallel layout."""

from __future__ import annotations

from mindspeed_mm.arguments.flag import (
    BOOLEAN,
    PATH,
    SWITCH,
    TEXT,
    TEXTS,
    Flag,
    Group,
    Inert,
    Refused,
    integer,
    one_of,
    real,
)

_NO_MIX = Refused("under LoRA everything but the adapters is frozen; remove it")
_NO_HOOK = Inert("where recomputation needs an input with a gradient, it gets one")
_NO_PREFERENCE = Inert("it is read by preference training, which this script is not")
_NO_REINFORCEMENT = Refused("reinforcement learning is not part of this package; remove it")
_NO_SEARCH = Refused("there is no search for a parallel layout; remove it and set the sizes yourself")
_NO_SIMULATION = Inert("there is no search for a parallel layout")
_LORA = "--lora-target-modules or --lora-target-parameters"

LORA = Group(
    "LoRA",
    (
        Flag(
            "--lora-target-modules",
            TEXTS,
            [],
            "linear layers that get an adapter: names, ends of paths, patterns or all-linear; turns LoRA on",
        ),
        Flag("--lora-target-parameters", TEXTS, [], "parameters that get an adapter, such as experts.down_proj"),
        Flag(
            "--lora-apply-modules",
            TEXTS,
            ["all"],
            "parts of the model that get adapters: components of model.json, paths or patterns",
            needs=_LORA,
        ),
        Flag("--lora-r", integer(1), 8, "rank of an adapter", needs=_LORA),
        Flag("--lora-alpha", integer(1), 16, "scale of an adapter times its rank", needs=_LORA),
        Flag("--lora-dropout", real(0, 1), 0.0, "dropout before an adapter", needs=_LORA),
        Flag(
            "--lora-mixed-training",
            {**BOOLEAN, "nargs": "?", "const": True},
            False,
            "train some parts fully",
            fsdp2=_NO_MIX,
            megatron=_NO_MIX,
            needs=_LORA,
        ),
        Flag(
            "--lora-register-forward-hook",
            TEXTS,
            ["word_embeddings", "input_layernorm", "final_layernorm"],
            "modules whose output must carry a gradient",
            fsdp2=_NO_HOOK,
            megatron=_NO_HOOK,
            needs=_LORA,
        ),
        Flag(
            "--load-base-model",
            PATH,
            None,
            "weights under the adapters: a checkpoint or a Hugging Face folder; default: those the model starts from",
            needs=_LORA,
        ),
    ),
)

PREFERENCE = Group(
    "preference and reinforcement training",
    (
        Flag("--dpo-beta", real(0), 0.1, "strength of the reference", fsdp2=_NO_PREFERENCE, megatron=_NO_PREFERENCE),
        Flag("--dpo-loss-type", TEXT, "sigmoid", "loss", fsdp2=_NO_PREFERENCE, megatron=_NO_PREFERENCE),
        Flag("--dpo-label-smoothing", real(0, 1), 0.0, "smoothing", fsdp2=_NO_PREFERENCE, megatron=_NO_PREFERENCE),
        Flag("--ref-model", PATH, None, "reference weights", fsdp2=_NO_PREFERENCE, megatron=_NO_PREFERENCE),
        Flag("--pref-ftx", real(0), 0.0, "part of the plain loss", fsdp2=_NO_PREFERENCE, megatron=_NO_PREFERENCE),
        Flag("--stage", one_of("ray_grpo"), None, "stage", fsdp2=_NO_REINFORCEMENT, megatron=_NO_REINFORCEMENT),
    ),
)

AUTOMATIC_PARALLELISM = Group(
    "search for a parallel layout",
    (
        Flag("--profile-subgraph-seg", SWITCH, False, "profile parts", fsdp2=_NO_SEARCH, megatron=_NO_SEARCH),
        Flag("--profile-stage", integer(0), None, "stage to profile", fsdp2=_NO_SEARCH, megatron=_NO_SEARCH),
        Flag("--simulated-nnodes", integer(1), None, "nodes", fsdp2=_NO_SIMULATION, megatron=_NO_SIMULATION),
        Flag("--simulated-nproc-per-node", integer(1), None, "ranks", fsdp2=_NO_SIMULATION, megatron=_NO_SIMULATION),
    ),
)
