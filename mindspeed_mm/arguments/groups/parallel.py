"""Processes and communication, FSDP2, the Megatron ways of splitting a model, and recomputation."""

from __future__ import annotations

import argparse
import re

from mindspeed_mm.arguments.flag import (
    ON_OFF,
    PATH,
    SWITCH,
    SWITCH_OFF,
    Flag,
    Group,
    Inert,
    Kind,
    Refused,
    integer,
    one_of,
    real,
)

_BACKENDS = ("hccl", "nccl", "gloo", "mpi", "npu:hccl,cpu:gloo", "cuda:nccl,cpu:gloo")


def _backend(text: str) -> str:
    if text not in _BACKENDS and not re.fullmatch(r"[a-z]+:[a-z]+(,[a-z]+:[a-z]+)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a backend; use one of {' '.join(_BACKENDS)}")
    return text


_BACKEND: Kind = {"type": _backend, "metavar": "BACKEND"}

_SPLIT = Refused("with --use-torch-fsdp2 the model is split by --fsdp2-config-path alone; set it to 1")
_CONTEXT = Refused("context parallelism is not supported together with --use-torch-fsdp2; set it to 1")
_ZERO = Refused("FSDP2 shards the optimizer by itself; remove it")
_RECOMPUTE = Refused("with --use-torch-fsdp2 list recompute_modules in --fsdp2-config-path instead; remove it")
_NOT_SPLIT = Inert("the model is split by FSDP2 alone")
_NOT_THERE = Refused("megatron-core has no such thing; use --recompute-granularity selective")
_OVERLAP = Inert("FSDP2 overlaps communication by itself; see num_to_forward_prefetch in its yaml")

DISTRIBUTED = Group(
    "processes and communication",
    (
        Flag("--distributed-backend", _BACKEND, "hccl", "collective library; one that is not there is replaced"),
        Flag(
            "--distributed-timeout-minutes",
            real(0.01),
            10,
            "how long a rank may stand still in training before the job ends and names it; never less than three times "
            "the slowest step",
        ),
        Flag(
            "--preparation-timeout-minutes",
            real(0.01),
            120,
            "the same until the first step is over, and while saving, exporting and generating",
        ),
        Flag("--local-rank", integer(0), 0, "set by torch.distributed.launch; torchrun sets LOCAL_RANK instead"),
    ),
)

FSDP2 = Group(
    "FSDP2",
    (
        Flag("--use-torch-fsdp2", SWITCH, False, "shard parameters, gradients and optimizer with PyTorch FSDP2"),
        Flag(
            "--fsdp2-config-path",
            PATH,
            None,
            "fsdp2_config.yaml: what is sharded, recomputed, prefetched and offloaded",
            megatron=Refused("it is read only with --use-torch-fsdp2; add that flag, or remove this one"),
        ),
        Flag(
            "--init-model-with-meta-device",
            SWITCH,
            False,
            "build without memory; weights go straight to the shards",
            megatron=Inert("every rank builds its own part, without values where they are about to be loaded"),
        ),
        Flag(
            "--use-cpu-initialization",
            SWITCH,
            False,
            "create weights on the CPU",
            fsdp2=Inert("weights are always created on the CPU or the meta device"),
            megatron=Inert("weights are always created on the CPU"),
        ),
        Flag(
            "--no-initialization",
            SWITCH_OFF,
            True,
            "leave weights uninitialised",
            dest="perform_initialization",
            fsdp2=Inert("weights that are about to be loaded are never initialised first"),
            megatron=Inert("weights that are about to be loaded are never initialised first"),
        ),
    ),
)

PARALLEL = Group(
    "Megatron parallelism",
    (
        Flag("--tensor-model-parallel-size", integer(1), 1, "ranks that share each layer", fsdp2=_SPLIT),
        Flag("--pipeline-model-parallel-size", integer(1), 1, "consecutive stages of layers", fsdp2=_SPLIT),
        Flag("--virtual-pipeline-model-parallel-size", integer(1), None, "chunks of a stage", fsdp2=_SPLIT),
        Flag("--context-parallel-size", integer(1), 1, "ranks that share each sequence", fsdp2=_CONTEXT),
        Flag(
            "--context-parallel-algo",
            one_of("ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"),
            "ulysses_cp_algo",
            "how a sequence is shared",
            fsdp2=Inert("the context-parallel size is 1"),
        ),
        Flag(
            "--ulysses-degree-in-cp",
            integer(1),
            None,
            "the Ulysses part of the context-parallel size",
            needs="--context-parallel-algo hybrid_cp_algo",
        ),
        Flag("--expert-model-parallel-size", integer(1), 1, "ranks that share the experts", fsdp2=_SPLIT),
        Flag(
            "--expert-tensor-parallel-size",
            integer(1),
            None,
            "ranks that share each expert (default: as --tensor-model-parallel-size)",
            fsdp2=_SPLIT,
        ),
        Flag("--sequence-parallel", SWITCH, False, "share activations too", fsdp2=_NOT_SPLIT),
        Flag("--use-distributed-optimizer", SWITCH, False, "shard the optimizer over data ranks", fsdp2=_ZERO),
        Flag("--overlap-grad-reduce", SWITCH, False, "reduce gradients during backward", fsdp2=_OVERLAP),
        Flag("--overlap-param-gather", SWITCH, False, "gather parameters during forward", fsdp2=_OVERLAP),
        Flag(
            "--overlap-p2p-communication",
            ON_OFF,
            False,
            "send between stages during computation; with --virtual-pipeline-model-parallel-size",
            fsdp2=_NOT_SPLIT,
        ),
        Flag(
            "--hetero-parallel",
            SWITCH,
            False,
            "another parallel layout for the encoder",
            fsdp2=Refused("FSDP2 has one layout for the whole model; remove it"),
            megatron=Refused("encoder and decoder share one layout; remove it"),
        ),
        Flag(
            "--hetero-encoder-mbs-scale",
            integer(1),
            1,
            "micro-batches that the encoder takes at once",
            needs="--hetero-parallel",
        ),
        Flag(
            "--reuse-fp32-param",
            SWITCH,
            False,
            "keep bfloat16 and float32 parameters in one storage",
            fsdp2=Inert("FSDP2 keeps one sharded copy of the parameters"),
            megatron=Inert("the optimizer keeps its float32 copy; --use-distributed-optimizer shards it"),
        ),
    ),
)

RECOMPUTE = Group(
    "Megatron recomputation",
    (
        Flag("--recompute-granularity", one_of("full", "selective"), None, "what is recomputed", fsdp2=_RECOMPUTE),
        Flag("--recompute-method", one_of("block", "uniform"), None, "which layers", fsdp2=_RECOMPUTE),
        Flag("--recompute-num-layers", integer(1), None, "how many layers", fsdp2=_RECOMPUTE),
        Flag(
            "--recompute-skip-core-attention",
            SWITCH,
            False,
            "keep attention outputs",
            fsdp2=_RECOMPUTE,
            megatron=_NOT_THERE,
        ),
        Flag(
            "--recompute-num-layers-skip-core-attention",
            integer(0),
            0,
            "in so many layers",
            fsdp2=_RECOMPUTE,
            megatron=_NOT_THERE,
        ),
        Flag(
            "--swap-attention",
            SWITCH,
            False,
            "move attention inputs to host memory",
            fsdp2=Inert("recompute_modules and offload_to_cpu of the FSDP2 yaml save this memory"),
            megatron=Inert("--recompute-granularity saves this memory"),
        ),
    ),
)
