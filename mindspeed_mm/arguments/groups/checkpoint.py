"""Where a run loads from and saves to."""

from __future__ import annotations

from mindspeed_mm.arguments.flag import BOOLEAN, PATH, SWITCH, Flag, Group, Inert, Refused, integer, one_of

_ALWAYS = Inert("always on: --load of a folder without a checkpoint is an error")

CHECKPOINT = Group(
    "checkpoints",
    (
        Flag("--save", PATH, None, "folder to save into; without it nothing is saved"),
        Flag("--save-interval", integer(1), None, "steps between saves (default: only at the end)", needs="--save"),
        Flag(
            "--async-save",
            SWITCH,
            False,
            "write while training goes on, from a copy of the weights and the optimizer in host memory",
            needs="--save",
        ),
        Flag("--keep-last", integer(1), None, "keep so many of the newest checkpoints", needs="--save"),
        Flag("--keep-every", integer(1), None, "keep those of multiples of so many steps", needs="--save"),
        Flag("--keep-best", integer(1), None, "keep so many with the lowest validation loss", needs="--save"),
        Flag("--no-save-optim", SWITCH, False, "leave the optimizer out; the run cannot be resumed exactly"),
        Flag("--no-save-rng", SWITCH, False, "leave random states out; the run cannot be resumed exactly"),
        Flag("--load", PATH, None, "checkpoints of a run, or a Hugging Face folder for its weights"),
        Flag("--ckpt-step", integer(0), None, "load this step instead of the latest one", needs="--load"),
        Flag("--no-load-optim", SWITCH, False, "do not restore the optimizer"),
        Flag("--no-load-rng", SWITCH, False, "do not restore random states"),
        Flag("--finetune", SWITCH, False, "load only the weights and start at step 0", needs="--load"),
        Flag("--load-strict", BOOLEAN, True, "missing or unexpected weights are an error"),
        Flag(
            "--auto-resume",
            SWITCH,
            False,
            "go on from the newest checkpoint in --save; when there is none yet, start as without this flag",
            needs="--save",
        ),
        Flag(
            "--load-fallback",
            SWITCH,
            False,
            "when the checkpoint to load is damaged, take the newest good one before it",
            needs="--load or --auto-resume",
        ),
        Flag("--exit-on-missing-checkpoint", SWITCH, False, "stop if --load is empty", fsdp2=_ALWAYS, megatron=_ALWAYS),
        Flag("--export-hf", PATH, None, "write a Hugging Face folder at the end of training"),
        Flag(
            "--export-hf-interval",
            integer(1),
            None,
            "write one every so many steps as well, beside it: FOLDER-iter_0000100",
            needs="--export-hf",
        ),
        Flag(
            "--ckpt-format",
            one_of("torch_dcp", "torch_dist", "torch"),
            "torch_dcp",
            "layout on disk",
            fsdp2=Refused("FSDP2 saves and loads torch_dcp only; use --ckpt-format torch_dcp"),
        ),
    ),
)
