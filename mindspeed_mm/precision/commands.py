"""``mindspeed-mm precision``: is a run aligned with its reference, and if not, where. Heavy imports wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision import judge_commands
from mindspeed_mm.precision.answering import JudgingGroup, answer

app = typer.Typer(
    cls=JudgingGroup,
    help="Compare a run with its reference. Exit code 0: aligned, 1: not aligned, 2: cannot be judged.",
    no_args_is_help=True,
)
app.add_typer(judge_commands.app)

_Out = Annotated[Path | None, typer.Option(help="Folder for verdict.json and what belongs to it.")]
_Config = Annotated[str, typer.Argument(help="A run's folder or a file; several of one side with commas between them.")]

_Record = Annotated[Path, typer.Argument(help="A record, or the --save folder of the run that holds it.")]
_State = Annotated[Path, typer.Argument(help="A checkpoint, or a folder of DCP, Hugging Face or Megatron.")]
_Given = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="What its files do not say: world_size=8. Repeatable.")
]


@app.command("config-diff")
def config_diff(
    reference: _Config,
    candidate: _Config,
    set_reference: _Given = None,
    set_candidate: _Given = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show what is the same, too.")] = False,
    out: _Out = None,
) -> None:
    """Compare settings by what they mean, across Megatron, Hugging Face, DeepSpeed, MindSpore, torchtitan and ours.

    What a run recorded of its live objects counts more than what its files declare; what a file leaves out is its
    system's default.
    """
    from mindspeed_mm.checkpoint.commands import new_table, print_table
    from mindspeed_mm.precision.settings.config_diff import DIFFERENT, judge, rows
    from mindspeed_mm.precision.settings.config_side import understand
    from mindspeed_mm.precision.settings.config_sources import read_sources

    sides = [
        understand(read_sources(place), _pairs(flag, given))
        for place, flag, given in (
            (reference, "--set-reference", set_reference),
            (candidate, "--set-candidate", set_candidate),
        )
    ]
    shown = [row for row in rows(*sides) if show_all or row.outcome == DIFFERENT]
    table = new_table("setting", "reference", "candidate", "")
    for row in shown:
        both = [str(setting) if setting else "?" for setting in (row.reference, row.candidate)]
        table.add_row(row.key.name, *both, row.key.severity if row.outcome == DIFFERENT else row.outcome)
    if shown:
        print_table(table)
    verdict = judge(*sides)
    for finding in verdict.findings:
        if finding.severity == "error":
            print(f"{finding.site}: {finding.next_command}")
    answer(verdict, out, findings_shown=True)


@app.command()
def curve(
    reference: Annotated[Path, typer.Argument(help="metrics.jsonl, a log, trainer_state.json, TensorBoard, CSV.")],
    candidate: Annotated[Path, typer.Argument(help="The same, or the folder that holds it.")],
    ref2: Annotated[Path | None, typer.Option(help="Another run of the reference: its own noise.")] = None,
    preset: Annotated[str, typer.Option(help="spec004, or lr0 for runs whose weights do not change.")] = "spec004",
    min_steps: Annotated[int, typer.Option(min=1, help="Fewer steps that pass cannot be judged: exit code 2.")] = 1000,
    out: _Out = None,
) -> None:
    """Judge a loss curve, and the gradient norms, by the documented criteria and by what they do not see."""
    from mindspeed_mm.checkpoint.commands import new_table, print_table
    from mindspeed_mm.precision.curves.criteria import judge_curves
    from mindspeed_mm.precision.curves.curves import read_curve

    ours, theirs = read_curve(reference), read_curve(candidate)
    second = read_curve(ref2) if ref2 else None
    verdict, found = judge_curves(ours, theirs, second, preset, min_steps)
    table = new_table("criterion", "", "")
    for criterion in found:
        table.add_row(criterion.name, str(criterion), "holds" if criterion.passed else "fails")
    print_table(table)
    if out is not None:
        from mindspeed_mm.precision.curves.curve_plot import draw

        out.mkdir(parents=True, exist_ok=True)
        (out / "curve.png").write_bytes(draw(ours, theirs, second))
    answer(verdict, out)


@app.command("data-diff")
def data_diff(
    reference: _Record,
    candidate: _Record,
    tokenizer: Annotated[Path | None, typer.Option(help="Hugging Face folder, to show text for tokens.")] = None,
    out: _Out = None,
) -> None:
    """Say whether two records hold the same samples: reordered, shifted, missing, duplicated, with other content."""
    from mindspeed_mm.precision.comparing.data_diff import judge_data, placed
    from mindspeed_mm.precision.records.record import Record

    decode = None
    if tokenizer is not None:
        from transformers import AutoTokenizer

        decode = AutoTokenizer.from_pretrained(tokenizer).decode
    answer(judge_data(placed(Record.open(reference)), placed(Record.open(candidate)), decode), out)


@app.command("state-diff")
def state_diff(
    reference: _State,
    candidate: _State,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer's state out.")] = False,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Relative L2 distance that is allowed.")] = 0.0,
    out: _Out = None,
) -> None:
    """Compare weights and optimizer state: checkpoints, DCP, Hugging Face and Megatron folders, records."""
    from mindspeed_mm.checkpoint.compare import differences
    from mindspeed_mm.precision.comparing.state_diff import is_record, judge_records, judge_state
    from mindspeed_mm.precision.records.record import Record

    if is_record(reference) and is_record(candidate):
        answer(judge_records(Record.open(reference), Record.open(candidate), tolerance), out)
    answer(judge_state(*differences(reference, candidate, weights_only=weights_only), tolerance), out)


@app.command()
def env(
    run: Annotated[str | None, typer.Argument(help="A run's folder, its launch script, or a config of it.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="As a run with --use-deter-comp: all has to be repeatable.")
    ] = False,
    backend: Annotated[str | None, typer.Option(help="As --distributed-backend; default: the device's own.")] = None,
    out: _Out = None,
) -> None:
    """Show what repeatable numbers depend on here, and refuse what cannot be repeatable."""
    from mindspeed_mm import accelerator
    from mindspeed_mm.checkpoint.commands import new_table, print_table
    from mindspeed_mm.precision.settings.config_side import Side, understand
    from mindspeed_mm.precision.settings.config_sources import read_sources
    from mindspeed_mm.precision.settings.environment import judge_environment

    side = understand(read_sources(run)) if run else Side()
    limits: list[str] = []
    if deterministic or side.value("deterministic") is True:
        limits = accelerator.determinism_limits()
        accelerator.use_deterministic_algorithms()  # what the run would do, in this process
    rows = accelerator.conditions(backend=backend)
    table = new_table("on this machine", "in force", "repeatable", "")
    for row in rows:
        word = {True: "yes", False: "no", None: "if the same"}[row.repeatable]
        table.add_row(row.name, row.value, word, row.advice)
    print_table(table)
    verdict = judge_environment(rows, side, deterministic)
    verdict.notes += limits
    answer(verdict, out)


@app.command()
def report(
    reference: _Record,
    candidate: _Record,
    out: Annotated[Path, typer.Option(help="Folder for report.html and verdict.json.")],
    verdict: Annotated[
        list[Path] | None, typer.Option(help="The --out folder of a check made before. Repeatable.")
    ] = None,
    min_steps: Annotated[int, typer.Option(min=1, help="As for curve.")] = 1000,
) -> None:
    """Put all that two runs' folders tell on one HTML page: curves, the first difference on the module tree, settings.

    The page needs no other file and no network.
    """
    from mindspeed_mm.precision.report import collect, page

    found = collect(reference, candidate, verdict or [], min_steps)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(page(found), encoding="utf-8")
    print(f"wrote {out / 'report.html'}")
    answer(found.whole, out)


@app.command("import-msprobe")
def import_msprobe(
    dump: Annotated[Path, typer.Argument(help="Its dump_path, a step's folder or a dump.json.")],
    out: Annotated[Path, typer.Argument(help="Folder of the record, to be a reference of compare.")],
    rank: Annotated[int, typer.Option(min=0, help="Which process's dump.")] = 0,
) -> None:
    """Make a reference of what msprobe dumped. Its statistics allow a comparison by norms only."""
    from mindspeed_mm.precision import msprobe

    steps = msprobe.import_msprobe(dump, out, rank)
    print(f"wrote {out}: steps {', '.join(map(str, steps))}\nnote: {msprobe.DEGRADED}")


@app.command("export-msprobe")
def export_msprobe(
    record: _Record,
    out: Annotated[Path, typer.Argument(help="Folder to write: step0/rank0/dump.json and so on.")],
) -> None:
    """Write a record as msprobe would have dumped it, for its graph viewer."""
    from mindspeed_mm.precision import msprobe
    from mindspeed_mm.precision.records.record import Record

    print(f"wrote {msprobe.export_msprobe(Record.open(record), out)} steps to {out}")


def _pairs(flag: str, given: list[str] | None) -> dict[str, str]:
    for text in given or []:
        if "=" not in text:
            raise UserError(f"{flag} {text}: write KEY=VALUE, world_size=8 say")
    return dict(text.split("=", 1) for text in given or [])
