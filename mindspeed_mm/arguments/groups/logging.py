"""What a run reports."""

from __future__ import annotations

from mindspeed_mm.arguments.flag import PATH, SWITCH, TEXT, Flag, Group, integer

LOGGING = Group(
    "logging",
    (
        Flag("--log-interval", integer(1), 100, "steps between log lines"),
        Flag("--log-throughput", SWITCH, False, "add TFLOP/s per device to the log line"),
        Flag("--log-tps", SWITCH, False, "add 'tokens per sample' to the log line"),
        Flag("--tensorboard-dir", PATH, None, "write TensorBoard events here"),
        Flag(
            "--tensorboard-log-interval",
            integer(1),
            1,
            "steps between points, in TensorBoard and wandb",
            needs="--tensorboard-dir or --wandb-project",
        ),
        Flag("--wandb-project", TEXT, None, "write to this Weights & Biases project"),
        Flag("--wandb-exp-name", TEXT, None, "name of the run; wandb makes one up", needs="--wandb-project"),
        Flag("--wandb-save-dir", PATH, None, "where wandb keeps its files, else --save", needs="--wandb-project"),
    ),
)
