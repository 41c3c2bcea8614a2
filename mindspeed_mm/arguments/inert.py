"""Which flags have no effect on a road, and telling the user about those that were passed."""

from __future__ import annotations

from argparse import Namespace

from mindspeed_mm.arguments.flag import Inert
from mindspeed_mm.arguments.groups import FLAGS


def inert_flags(road: str) -> dict[str, str]:
    """Return attribute name -> reason for the flags that ``road`` ("fsdp2" or "megatron") accepts without effect."""
    return {f.dest: status.reason for f in FLAGS.values() if isinstance(status := f.status(road), Inert)}


def report_inert_flags(args: Namespace, road: str) -> list[str]:
    """Return one line per reason, naming the flags of the command line that have no effect on ``road``."""
    reasons = inert_flags(road)
    by_reason: dict[str, list[str]] = {}
    for flag in FLAGS.values():
        if flag.dest not in args.explicit:
            continue
        if flag.dest in reasons:
            by_reason.setdefault(reasons[flag.dest], []).append(flag.name)
        elif flag.needs and not _holds(args, flag.needs):
            by_reason.setdefault(f"it is read only with {flag.needs}", []).append(flag.name)
    return [f"no effect: {' '.join(names)} ({reason})" for reason, names in by_reason.items()]


def _holds(args: Namespace, needs: str) -> bool:
    for need in needs.split(" or "):
        name, *wanted = need.split()
        value = getattr(args, FLAGS[name].dest)
        if str(value) == wanted[0] if wanted else value:
            return True
    return False
