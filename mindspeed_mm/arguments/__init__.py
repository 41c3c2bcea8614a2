"""The command line of a training run: flags by group, their validation, and what follows from them.

Importing this package loads neither torch, megatron nor transformers, so that ``--help`` answers at once.
"""

from __future__ import annotations

from mindspeed_mm.arguments.global_args import get_args, set_args
from mindspeed_mm.arguments.inert import inert_flags, report_inert_flags
from mindspeed_mm.arguments.parser import build_parser, parse_args
from mindspeed_mm.arguments.validation import road_of, validate_args

__all__ = [
    "build_parser",
    "get_args",
    "inert_flags",
    "parse_args",
    "report_inert_flags",
    "road_of",
    "set_args",
    "validate_args",
]
