"""Batch sizes, duration, precision and loss of a run; evaluation; when to stop."""

from __future__ import annotations

from mindspeed_mm.arguments.flag import ON_OFF, SWITCH, Flag, Group, Inert, Refused, integer, one_of

_LOSS_NOT_SUPPORTED = Refused("this loss is not supported; use --calculate-per-token-loss, the exact token mean")

TRAINING = Group(
    "training",
    (
        Flag("--micro-batch-size", integer(1), 1, "samples that one rank takes through one forward and backward"),
        Flag(
            "--global-batch-size",
            integer(1),
            None,
            "samples of one optimizer step over all ranks (default: micro-batch size x data-parallel size)",
        ),
        Flag("--train-iters", integer(1), None, "optimizer steps to train for; required unless --train-samples"),
        Flag("--train-samples", integer(1), None, "samples to train for instead, in whole global batches"),
        Flag("--skip-train", SWITCH, False, "only evaluate"),
        Flag("--num-workers", integer(0), 1, "dataloader processes per rank; 0 loads in the training process"),
        Flag("--seq-length", integer(1), None, "longest sequence in tokens; longer samples are cut"),
        Flag(
            "--variable-seq-lengths",
            SWITCH,
            False,
            "let micro-batches differ in sequence length",
            fsdp2=Inert("a batch is always as long as its longest sample"),
            megatron=Inert("a batch is always as long as its longest sample"),
        ),
        Flag("--seed", integer(0), 1234, "decides the random weights, dropout and the order of the data"),
        Flag(
            "--use-deter-comp",
            SWITCH,
            False,
            "bitwise repeatable runs: deterministic kernels and collectives",
            aliases=("--npu-deterministic",),
        ),
        Flag(
            "--bf16",
            SWITCH,
            False,
            "compute in bfloat16; with FSDP2 on fp32 parameters, and only where its yaml names no param_dtype",
        ),
        Flag(
            "--fp16",
            SWITCH,
            False,
            "keep the parameters in float16",
            fsdp2=Refused("FSDP2 has no loss scaling; use --bf16, or param_dtype: bf16 in --fsdp2-config-path"),
            megatron=Refused("there is no loss scaling; use --bf16"),
        ),
        Flag("--allow-tf32", SWITCH, False, "let float32 matrix products use TF32 or HF32 where the device has it"),
        Flag("--calculate-per-sample-loss", SWITCH, False, "loss: mean over tokens of a sample, then over samples"),
        Flag("--calculate-per-token-loss", SWITCH, False, "loss: mean over all target tokens of the global batch"),
        Flag(
            "--calculate-token-loss",
            SWITCH,
            False,
            "loss: token mean per micro-batch",
            fsdp2=_LOSS_NOT_SUPPORTED,
            megatron=_LOSS_NOT_SUPPORTED,
        ),
        Flag(
            "--calculate-square-loss",
            SWITCH,
            False,
            "loss: samples weighted by 1/sqrt(target tokens)",
            fsdp2=_LOSS_NOT_SUPPORTED,
            megatron=_LOSS_NOT_SUPPORTED,
        ),
        Flag(
            "--nan-policy",
            one_of("stop", "skip", "rollback"),
            "stop",
            "what to do about a step whose loss or gradient is not finite, which never changes weights or optimizer: "
            "end the run and name the samples and the module; go on with the next step; or go back to the newest "
            "checkpoint of --save and leave the samples of that step out",
        ),
        Flag(
            "--nan-limit",
            integer(1),
            10,
            "stop all the same after more skipped steps in a row, or more rollbacks in the run, than this",
            needs="--nan-policy skip or --nan-policy rollback",
        ),
        Flag(
            "--check-for-nan-in-loss-and-grad",
            ON_OFF,
            True,
            "end the run when a loss or gradient is not finite",
            fsdp2=Inert("every step is checked at no cost, and --nan-policy says what happens"),
        ),
        Flag("--manual-gc", SWITCH, False, "collect Python garbage at the same step on every rank"),
        Flag("--manual-gc-interval", integer(0), 0, "steps between collections; 0 is never", needs="--manual-gc"),
        Flag("--manual-gc-eval", ON_OFF, True, "collect around evaluations too", needs="--manual-gc"),
    ),
)

EVALUATION = Group(
    "evaluation",
    (
        Flag("--eval-interval", integer(1), 1000, "steps between evaluations"),
        Flag(
            "--eval-iters",
            integer(-1),
            100,
            "global batches of one evaluation; -1 is every sample once, 0 turns evaluation off",
        ),
        Flag(
            "--eval-generate",
            integer(0),
            0,
            "validation samples of which the last answer is generated and compared at every evaluation",
            megatron=Refused("a split model cannot generate; remove it, and generate from what --export-hf writes"),
        ),
    ),
)

STOPPING = Group(
    "stopping early",
    (
        Flag("--exit-interval", integer(1), None, "save and exit at the first step that this divides"),
        Flag("--exit-duration-in-mins", integer(1), None, "save and exit after this many minutes"),
        Flag(
            "--exit-signal-handler",
            SWITCH,
            False,
            "save and exit on SIGTERM",
            fsdp2=Inert("always on: after SIGTERM the ranks save and exit"),
            megatron=Inert("always on: after SIGTERM the ranks save and exit"),
        ),
    ),
)
