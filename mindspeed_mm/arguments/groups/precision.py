"""What a run writes down about its numbers, for ``mindspeed-mm precision``."""

from __future__ import annotations

from mindspeed_mm.arguments.flag import PATH, SWITCH, TEXT, Flag, Group, integer, one_of

PRECISION = Group(
    "precision alignment",
    (
        Flag("--precision-dir", PATH, None, "folder of the record (default: 'precision' in --save)"),
        Flag(
            "--precision-capture",
            TEXT,
            None,
            "record these steps: 'steps=0-1,level=module,tensors=PATTERN'; steps count from 0, level=parameter leaves "
            "the modules out, tensors= keeps whole tensors of modules and parameters (patterns such as *.layers.0.*)",
        ),
        Flag(
            "--precision-mode",
            one_of("lr0"),
            None,
            "lr0: the optimizer runs and its update is discarded; the gradients' sum over all steps is recorded",
        ),
        Flag(
            "--precision-perturb",
            integer(0),
            0,
            "seed of rounding noise in the outputs of leaf modules (half a unit in the last place), for records that "
            "'mindspeed-mm precision band' measures the reference's own spread on; 0: none",
        ),
        Flag(
            "--precision-on-anomaly",
            TEXT,
            None,
            "'dump=3': when a loss or gradient is not finite, or its norm or the loss leaps, write down the last 3 "
            "steps and a script that replays them",
        ),
        Flag(
            "--log-local-norm",
            SWITCH,
            False,
            "log the gradient norm of every parameter, all ranks together",
        ),
    ),
)
