from __future__ import annotations

import shlex

import pytest

from mindspeed_mm.errors import UserError
from tests.arguments.lines import FSDP2, validated

MEGATRON = ("--lr", "1e-5", "--train-iters", "100")


def problem(*argv: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as error:
        validated(*argv, world_size=world_size)
    return str(error.value)


@pytest.mark.parametrize(
    ("argv", "shown", "fix"),
    [
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size 2", "set it to 1"),
        ("--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 2", "set it to 1"),
        ("--expert-model-parallel-size 4", "--expert-model-parallel-size 4", "set it to 1"),
        ("--context-parallel-size 2", "--context-parallel-size 2", "not supported together with --use-torch-fsdp2"),
        ("--use-distributed-optimizer", "--use-distributed-optimizer", "remove it"),
        ("--recompute-granularity full", "--recompute-granularity full", "recompute_modules"),
        ("--recompute-method block", "--recompute-method block", "recompute_modules"),
        ("--recompute-num-layers 3", "--recompute-num-layers 3", "recompute_modules"),
        ("--fp16", "--fp16", "use --bf16"),
        ("--bf16 --fp16", "--bf16 and --fp16", "remove one"),
        ("--ckpt-format torch", "--ckpt-format torch", "use --ckpt-format torch_dcp"),
        ("--ckpt-format torch_dist", "--ckpt-format torch_dist", "use --ckpt-format torch_dcp"),
        (
            "--calculate-per-sample-loss --calculate-per-token-loss",
            "--calculate-per-sample-loss and --calculate-per-token-loss",
            "remove one",
        ),
        ("--calculate-square-loss", "--calculate-square-loss", "use --calculate-per-token-loss"),
        ("--lora-target-modules q_proj --lora-mixed-training", "--lora-mixed-training", "remove it"),
        ("--lora-r 4", "--lora-r", "there is no LoRA without --lora-target-modules"),
        ("--downcast-to-bf16", "--downcast-to-bf16", "param_dtype: bf16"),
        ("--stage ray_grpo", "--stage ray_grpo", "remove it"),
        ("--min-lr 1e-3", "--min-lr 0.001 is above --lr 1e-05", "lower it"),
        ("--lr-warmup-init 1", "--lr-warmup-init 1.0 is above --lr 1e-05", "lower it"),
        (
            "--lr-warmup-fraction 0.1 --lr-warmup-iters 5",
            "--lr-warmup-fraction 0.1 and --lr-warmup-iters 5",
            "remove one",
        ),
        ("--lr-warmup-iters 100", "--lr-warmup-iters 100 leaves no step of the 100", "shorten the warm-up"),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction 1.0 (100 steps)", "shorten the warm-up"),
        ("--lr-warmup-iters 20 --lr-decay-iters 10", "--lr-warmup-iters 20", "shorten the warm-up"),
        ("--lr-decay-style WSD", "--lr-decay-style WSD", "add --lr-wsd-decay-iters"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 101", "--lr-wsd-decay-iters 101", "shorten one"),
        ("--train-samples 5", "--train-iters 100 and --train-samples 5", "remove one"),
        ("--start-weight-decay 0.1", "--start-weight-decay 0.1", "add --weight-decay-incr-style"),
        ("--weight-decay-incr-style linear --start-weight-decay 0", "linear", "needs --end-weight-decay; add it"),
        (
            "--weight-decay-incr-style cosine --start-weight-decay 0.2 --end-weight-decay 0.1",
            "--end-weight-decay 0.1 is below --start-weight-decay 0.2",
            "can only grow",
        ),
        (
            "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
            "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler",
            "remove one",
        ),
    ],
)
def test_combinations_that_fsdp2_refuses(argv: str, shown: str, fix: str) -> None:
    message = problem(*FSDP2, *argv.split())
    assert message.startswith("command line: ")
    assert shown in message
    assert fix in message


def test_every_problem_is_reported_at_once() -> None:
    lines = problem("--use-torch-fsdp2", "--fp16", "--tensor-model-parallel-size", "2").splitlines()
    assert len(lines) == 4  # and the missing --lr and --train-iters
    assert all(line.startswith("command line: --") for line in lines)


def test_fsdp2_flags_need_the_fsdp2_road() -> None:
    message = problem(*MEGATRON, "--fsdp2-config-path", "a.yaml")
    assert message == (
        "command line: --fsdp2-config-path a.yaml: it is read only with --use-torch-fsdp2; "
        "add that flag, or remove this one"
    )
    assert "--ckpt-format torch_dcp: it needs --use-torch-fsdp2" in problem(*MEGATRON, "--ckpt-format", "torch_dcp")
    assert validated(*MEGATRON).ckpt_format == "torch_dist"


def test_one_device_connection_is_refused_with_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=2" in problem(*FSDP2)
    validated(*MEGATRON)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "2")
    validated(*FSDP2)


def test_global_batch() -> None:
    assert validated(*FSDP2, "--micro-batch-size", "3", world_size=4).global_batch_size == 12
    assert validated(*FSDP2, "--global-batch-size", "12", world_size=4).data_parallel_size == 4
    message = problem(*FSDP2, "--micro-batch-size", "2", "--global-batch-size", "10", world_size=4)
    assert message == (
        "command line: --global-batch-size 10 is not a multiple of --micro-batch-size 2 x 4 data-parallel ranks = 8; "
        "use 8 or 16"
    )
    assert problem(*FSDP2, "--global-batch-size", "2", world_size=4).endswith("= 4; use 4")


def test_megatron_sizes_divide_the_job() -> None:
    args = validated(*MEGATRON, "--tensor-model-parallel-size", "2", "--context-parallel-size", "2", world_size=8)
    assert args.data_parallel_size == 2
    message = problem(*MEGATRON, "--tensor-model-parallel-size", "2", world_size=3)
    assert "--tensor-model-parallel-size 2 = 2 does not divide the 3 ranks" in message
    message = problem(*MEGATRON, "--expert-model-parallel-size", "3", world_size=4)
    assert "--expert-model-parallel-size 3 x 1 ranks for each expert" in message
    assert "does not divide the 4 ranks of a pipeline stage: 4 data-parallel x 1 context-parallel x 1 tens" in message


@pytest.mark.parametrize(
    ("argv", "shown", "fix"),
    [
        ("--fp16", "--fp16: there is no loss scaling", "use --bf16"),
        ("--optimizer muon", "--optimizer muon", "use adam"),
        ("--eval-generate 3", "--eval-generate 3", "--export-hf"),
        ("--hetero-parallel", "--hetero-parallel", "remove it"),
        ("--sequence-parallel", "--tensor-model-parallel-size, which is 1", "raise that"),
        ("--virtual-pipeline-model-parallel-size 2", "there is one stage", "raise --pipeline-model-parallel-size"),
        ("--virtual-pipeline-model-parallel-size 1 --pipeline-model-parallel-size 2", "one chunk", "use 2 or more"),
        (
            "--virtual-pipeline-model-parallel-size 2 --pipeline-model-parallel-size 2 --global-batch-size 3",
            "the 3 micro-batches of a step are not a multiple of --pipeline-model-parallel-size 2",
            "a multiple of 2",
        ),
        (
            "--virtual-pipeline-model-parallel-size 2 --pipeline-model-parallel-size 2 --eval-iters -1",
            "--eval-iters -1",
            "give the number of global batches",
        ),
        ("--overlap-p2p-communication", "--virtual-pipeline-model-parallel-size", "add it"),
        ("--overlap-param-gather", "--use-distributed-optimizer and --overlap-grad-reduce", "add them"),
        ("--recompute-granularity full", "--recompute-method uniform or block", "add it"),
        ("--recompute-granularity full --recompute-method block", "needs --recompute-num-layers", "add it"),
        ("--recompute-num-layers 2", "is for --recompute-granularity full", "add that"),
        ("--recompute-skip-core-attention", "megatron-core has no such thing", "use --recompute-granularity"),
        ("--moe-token-dispatcher-type alltoall_seq", "needs MindSpeed", "use alltoall or allgather"),
    ],
)
def test_combinations_that_megatron_refuses(argv: str, shown: str, fix: str) -> None:
    message = problem(*MEGATRON, *argv.split(), world_size=2)
    assert message.startswith("command line: ")
    assert shown in message
    assert fix in message


def test_decay_lasts_as_long_as_training() -> None:
    assert validated(*FSDP2).lr_decay_iters == 100
    assert validated(*FSDP2, "--lr-decay-iters", "50", "--lr-warmup-fraction", "0.99").lr_decay_iters == 50
    line = "--lr-decay-style WSD --lr-wsd-decay-iters 90 --lr-warmup-iters 10"
    assert validated(*FSDP2, *shlex.split(line)).lr_decay_iters == 100


def test_length_in_samples() -> None:
    args = validated("--use-torch-fsdp2", "--lr", "1", "--train-samples", "35", "--global-batch-size", "8")
    assert (args.train_iters, args.lr_decay_iters) == (4, 4)
    message = problem("--use-torch-fsdp2", "--lr", "1", "--train-samples", "3", "--global-batch-size", "8")
    assert "--train-samples 3 is less than one global batch of 8; raise it" in message


def test_evaluation_alone_needs_neither_rate_nor_length() -> None:
    args = validated("--use-torch-fsdp2", "--skip-train")
    assert (args.train_iters, args.lr, args.lr_decay_style) == (1, 0.0, "constant")


def test_weight_decay_ends() -> None:
    args = validated(*FSDP2)
    assert (args.start_weight_decay, args.end_weight_decay) == (0.1, 0.1)
    line = "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.2"
    args = validated(*FSDP2, *shlex.split(line))
    assert (args.start_weight_decay, args.end_weight_decay) == (0.0, 0.2)


def test_ranks_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert validated(*FSDP2, "--local_rank=3", world_size=8).local_rank == 3
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    args = validated(*FSDP2, world_size=8)
    assert (args.world_size, args.rank, args.local_rank) == (8, 5, 1)


def test_tied_models_and_types() -> None:
    args = validated(*FSDP2)
    assert (args.params_dtype_name, args.untie_embeddings_and_output_weights) == ("fp32", False)
    assert validated(*FSDP2, "--bf16").params_dtype_name == "bf16"
