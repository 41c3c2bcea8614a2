"""``python -m mindspeed_mm.arguments.reference`` prints every flag as a Markdown table for the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mindspeed_mm.arguments.flag import Flag, Inert, Refused
from mindspeed_mm.arguments.groups import GROUPS

_HERE = f"{Path(__file__).resolve().parents[2]}/"


def effect(flag: Flag, road: str) -> str:
    """Say in a few words what ``flag`` does on ``road``."""
    status = flag.status(road)
    if isinstance(status, Inert):
        return f"none: {status.reason}"
    if isinstance(status, Refused):
        return f"error: {status.fix}"
    return f"with `{flag.needs}`" if flag.needs else "yes"


def table() -> Iterator[str]:
    """Yield the lines, one table for each group."""
    for group in GROUPS:
        yield from (
            f"## {group.title}",
            "",
            "| flag | default | meaning | effect with FSDP2 |",
            "| --- | --- | --- | --- |",
        )
        for flag in group.flags:
            default = "" if flag.has_plain_default else f"`{flag.default}`".replace(_HERE, "")
            yield f"| `{flag.name}` | {default} | {flag.help} | {effect(flag, 'fsdp2')} |"
        yield ""


if __name__ == "__main__":
    print("\n".join(table()))
