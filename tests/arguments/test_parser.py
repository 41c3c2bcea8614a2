from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

import pytest

from mindspeed_mm.arguments import build_parser, parse_args, reference
from mindspeed_mm.arguments.flag import Flag
from mindspeed_mm.arguments.groups import FLAGS, GROUPS
from mindspeed_mm.errors import UserError
from tests.arguments.lines import CUSTOM_MODEL, PRETRAIN_TRANSFORMERS, PRETRAIN_VLM, validated

DOCUMENTED_DEFAULTS = {
    "distributed_backend": "hccl",
    "distributed_timeout_minutes": 10,
    "mm_data": "",
    "mm_model": "",
    "use_mcore_models": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "micro_batch_size": 1,
    "global_batch_size": None,
    "num_workers": 1,
    "lr": None,
    "min_lr": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "lr_decay_style": "linear",
    "weight_decay": 0.1,
    "lr_warmup_init": 0.0,
    "lr_warmup_iters": 0,
    "lr_warmup_fraction": None,
    "clip_grad": 1.0,
    "train_iters": None,
    "seed": 1234,
    "log_interval": 100,
    "eval_interval": 1000,
    "eval_iters": 100,
    "save_interval": None,
    "ckpt_format": "torch_dcp",
    "ckpt_step": None,
    "optimizer": "adam",
    "optimizer_selection": "fused_adamw",
    "weight_decay_exclude_modules": [],
    "lr_scale_modules": [],
    "lr_mult": 1.0,
    "lora_target_modules": [],
    "lora_apply_modules": ["all"],
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_mixed_training": False,
    "load_base_model": None,
    "matched_adamw_rms": 0.2,
    "muon_momentum": 0.95,
    "ns_steps": 5,
    "dpo_beta": 0.1,
    "data_balance_sorting_algo": "post_global_balancing_greedy_without_pad",
    "max_seq_len": 2048,
    "moe_token_dispatcher_type": "allgather",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "max_position_embeddings": None,
    "seq_length": None,
    "skip_train": False,
    "load_strict": True,
    "manual_gc_eval": True,
    "plugin": [],
}


def test_documented_defaults() -> None:
    args = vars(parse_args(argv=[]))
    assert {name: args[name] for name in DOCUMENTED_DEFAULTS} == DOCUMENTED_DEFAULTS
    assert args["mm_tool"].endswith("mindspeed_mm/tools/tools.json")
    assert args["explicit"] == frozenset()


@pytest.mark.parametrize("line", [PRETRAIN_TRANSFORMERS, CUSTOM_MODEL], ids=["pretrain_transformers", "custom"])
def test_published_fsdp2_lines_pass(line: list[str]) -> None:
    args = validated(*line, world_size=8)
    assert args.explicit == {FLAGS[word].dest for word in line if word.startswith("--")}
    assert args.lr == 1e-5
    assert args.data_parallel_size == 8


def test_published_vlm_line_passes() -> None:
    args = validated(*PRETRAIN_VLM, world_size=8)
    assert args.data_parallel_size == 2
    assert args.ckpt_format == "torch"
    assert args.lora_target_modules == ["linear_qkv", "linear_proj"]
    assert args.perform_initialization is False


def sample(flag: Flag) -> list[str]:
    """Return words that are a valid value of ``flag``."""
    if "action" in flag.kind:
        return ["plugin.py"] if flag.kind["action"] == "append" else []
    choices = flag.kind["metavar"].strip("{}").split(",")
    return [{"N": "1", "X": "0.5", "TEXT": "a", "PATH": "a", "BACKEND": "gloo"}.get(choices[0], choices[0])]


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
def test_underscores_and_dashes_are_the_same(flag: Flag) -> None:
    bare = flag.name.removeprefix("--")
    dashes = parse_args(argv=[f"--{bare.replace('_', '-')}", *sample(flag)])
    underscores = parse_args(argv=[f"--{bare.replace('-', '_')}", *sample(flag)])
    assert dashes == underscores
    assert dashes.explicit == {flag.dest}


def test_extra_flags_of_the_user() -> None:
    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        group = parser.add_argument_group("mine")
        group.add_argument("--my_flag", type=int, default=3)
        group.add_argument("--use-thing", type=bool, default=True)
        group.add_argument("--mm-data", default="mine.json")
        return parser

    args = parse_args(provider, argv=["--my-flag=4", "--use_thing", "false"])
    assert (args.my_flag, args.use_thing, args.mm_data) == (4, False, "mine.json")
    assert args.explicit == {"my_flag", "use_thing"}


def test_args_defaults_hold_only_for_flags_not_passed() -> None:
    defaults = {"seed": 7, "micro_batch_size": 2, "dataloader_type": "external"}
    args = parse_args(args_defaults=defaults, argv=["--seed", "9"])
    assert (args.seed, args.micro_batch_size, args.dataloader_type) == (9, 2, "external")
    assert args.explicit == {"seed"}


def test_values() -> None:
    line = "--plugin a.py --plugin b --load-strict false --no-manual-gc-eval --lora-mixed-training"
    args = parse_args(argv=shlex.split(line))
    assert args.plugin == ["a.py", "b"]
    assert args.load_strict is False
    assert args.manual_gc_eval is False
    assert args.lora_mixed_training is True
    assert parse_args(argv=[]).plugin == []
    assert parse_args(argv=["--npu-deterministic"]).use_deter_comp is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--sead 3", "unknown flag --sead; remove or correct it. Did you mean '--seed'?"),
        ("--lode_strict true", "unknown flag --lode_strict; remove or correct it. Did you mean '--load-strict'?"),
        ("--micro-batch 3", "unknown flag --micro-batch"),
        ("--train-iters 3 # comment", "'#' belongs to no flag; remove it, or put its flag before it (a comment"),
        ("--bf16 true", "'true' belongs to no flag"),
        ("--bf16=true", "--bf16: it takes no value; remove 'true'"),
        ("--lr", "--lr: its value is missing; give one"),
        ("--lora-target-modules", "--lora-target-modules: its values are missing; give at least one"),
        ("--lr fast", "--lr: 'fast' is not a number; give a number at least 0"),
        ("--lr -1e-5", "--lr: -1e-5 is out of range; give a number at least 0"),
        ("--lr nan", "--lr: nan is out of range"),
        ("--train-iters 1.5", "--train-iters: '1.5' is not a whole number; give a whole number at least 1"),
        ("--lr-warmup-fraction 2", "--lr-warmup-fraction: 2 is out of range; give a number at least 0 and at most 1"),
        ("--adam-beta1 1", "--adam-beta1: 1 is out of range; give a number at least 0 and below 1"),
        ("--log-interval 0", "--log-interval: 0 is out of range; give a whole number at least 1"),
        ("--save-interval 0", "--save-interval: 0 is out of range"),
        ("--eval-interval 0", "--eval-interval: 0 is out of range"),
        ("--micro-batch-size -2", "--micro-batch-size: -2 is out of range"),
        ("--lr-decay-style cosin", "--lr-decay-style: 'cosin' is not a choice; use one of constant, linear, cosine"),
        ("--load-strict perhaps", "--load-strict: 'perhaps' is neither true nor false; write one of the two"),
        ("--distributed-backend ncl,x", "--distributed-backend: 'ncl,x' is not a backend; use one of hccl nccl gloo"),
    ],
)  # fmt: skip
def test_mistakes(argv: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_args(argv=argv.split())
    assert str(error.value).startswith(f"command line: {message}")


def test_flags_are_declared_nowhere_else() -> None:
    dests = {action.dest for action in build_parser()._actions} - {"help"}
    assert dests == {flag.dest for flag in FLAGS.values()}
    assert len(FLAGS) == sum(len(group.flags) for group in GROUPS)


def test_help_is_fast_and_grouped() -> None:
    code = (
        "import sys\nfrom mindspeed_mm.arguments import parse_args\n"
        "try: parse_args(argv=['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'megatron', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=5, check=True)
    assert all(f"\n{group.title}:\n" in done.stdout for group in GROUPS)


def test_reference_lists_every_flag() -> None:
    rows = [line for line in reference.table() if line.startswith("| `--")]
    assert [row.split("`")[1] for row in rows] == list(FLAGS)
    assert all(row.count("|") == 5 for row in rows)
