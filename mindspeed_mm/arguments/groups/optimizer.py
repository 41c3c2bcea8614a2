"""The learning-rate schedule and the optimizer."""

from __future__ import annotations

from mindspeed_mm.arguments.flag import SWITCH, TEXTS, Flag, Group, Inert, Refused, integer, one_of, real

LEARNING_RATE = Group(
    "learning rate",
    (
        Flag("--lr", real(0), None, "highest learning rate, reached after warm-up; required to train"),
        Flag("--min-lr", real(0), 0.0, "lowest learning rate, kept once the decay is over"),
        Flag(
            "--lr-decay-style",
            one_of("constant", "linear", "cosine", "inverse-square-root", "WSD"),
            "linear",
            "shape of the schedule after warm-up",
        ),
        Flag("--lr-decay-iters", integer(1), None, "step at which the decay is over (default: the last step)"),
        Flag("--lr-warmup-fraction", real(0, 1), None, "length of the linear warm-up as a fraction of the decay"),
        Flag("--lr-warmup-iters", integer(0), 0, "length of the linear warm-up in steps"),
        Flag(
            "--lr-warmup-init",
            real(0),
            0.0,
            "learning rate at which the warm-up starts",
            needs="--lr-warmup-iters or --lr-warmup-fraction",
        ),
        Flag(
            "--lr-wsd-decay-iters",
            integer(1),
            None,
            "length of the final fall in steps",
            needs="--lr-decay-style WSD",
        ),
        Flag(
            "--lr-wsd-decay-style",
            one_of("exponential", "linear", "cosine", "minus_sqrt"),
            "exponential",
            "shape of the final fall",
            needs="--lr-decay-style WSD",
        ),
        Flag(
            "--override-opt_param-scheduler",
            SWITCH,
            False,
            "on resume, take the schedule from the command line and drop the checkpoint's",
        ),
        Flag(
            "--use-checkpoint-opt_param-scheduler",
            SWITCH,
            False,
            "on resume, take the schedule from the checkpoint and drop the command line's",
        ),
    ),
)

_ADAM = "--optimizer adam or --optimizer muon"

OPTIMIZER = Group(
    "optimizer",
    (
        Flag(
            "--optimizer",
            one_of("adam", "sgd", "muon"),
            "adam",
            "update rule; adam is AdamW, muon is Muon for weight matrices and AdamW for the rest (torch 2.9 or later)",
            megatron=Refused("Muon needs whole matrices, which megatron-core fuses and splits; use adam", ("sgd",)),
        ),
        Flag(
            "--optimizer-selection",
            one_of("fused_adamw", "fused_torch_adamw", "fused_ema_adamw"),
            "fused_adamw",
            "AdamW implementation",
            needs="--optimizer adam",
        ),
        Flag("--adam-beta1", real(0, below=1), 0.9, "decay of the first moment", needs=_ADAM),
        Flag("--adam-beta2", real(0, below=1), 0.999, "decay of the second moment", needs=_ADAM),
        Flag("--adam-eps", real(0), 1e-8, "added to the denominator", needs=_ADAM),
        Flag("--sgd-momentum", real(0), 0.9, "momentum", needs="--optimizer sgd"),
        Flag("--muon-momentum", real(0), 0.95, "momentum of Muon", needs="--optimizer muon"),
        Flag(
            "--matched-adamw-rms",
            real(0),
            0.2,
            "root mean square of Muon's update of a matrix at a learning rate of 1, like AdamW's",
            needs="--optimizer muon",
        ),
        Flag("--ns-steps", integer(1), 5, "Newton-Schulz iterations", needs="--optimizer muon"),
        Flag(
            "--ema-decay",
            real(0, 1),
            0.9999,
            "decay of the averaged weights",
            needs="--optimizer-selection fused_ema_adamw",
        ),
        Flag("--weight-decay", real(0), 0.1, "weight decay, decoupled except with sgd"),
        Flag("--start-weight-decay", real(0), None, "weight decay of the first step"),
        Flag("--end-weight-decay", real(0), None, "weight decay of the last step"),
        Flag(
            "--weight-decay-incr-style",
            one_of("constant", "linear", "cosine"),
            "constant",
            "how weight decay goes from --start-weight-decay to --end-weight-decay",
        ),
        Flag("--weight-decay-all", SWITCH, False, "let biases and other one-dimensional parameters decay too"),
        Flag("--weight-decay-exclude-modules", TEXTS, [], "no weight decay for parameters whose name contains one of"),
        Flag(
            "--lr-scale-modules",
            TEXTS,
            [],
            "scale the learning rate of parameters whose name contains one of; each is a keyword, scaled by --lr-mult, "
            "or keyword=scale; where several match, the last counts",
        ),
        Flag("--lr-mult", real(0), 1.0, "the scale of keywords without one", needs="--lr-scale-modules"),
        Flag("--clip-grad", real(0), 1.0, "largest gradient norm; 0 turns clipping off, the norm is still reported"),
        Flag(
            "--enable-dummy-optimizer",
            SWITCH,
            False,
            "let a pipeline stage have nothing to train",
            fsdp2=Inert("there are no pipeline stages"),
            megatron=Inert("a stage may always have nothing to train"),
        ),
    ),
)
