"""The verbs of ``mindspeed-mm precision`` that compare records: their functions join the app of `commands`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.answering import answer

app = typer.Typer()

_Reference = Annotated[Path, typer.Argument(help="The reference's record, or the --save folder that holds it.")]
_Candidate = Annotated[Path, typer.Argument(help="The candidate's.")]
_Out = Annotated[Path | None, typer.Option(help="Folder for verdict.json and the table.")]
_Band = Annotated[Path | None, typer.Option(help="The reference's own spread, from 'precision band'.")]


class Replayed(str, Enum):
    """What to replay."""

    optimizer = "optimizer"
    module = "module"
    loss = "loss"


@app.command("compare")
def compare_command(reference: _Reference, candidate: _Candidate, band: _Band = None, out: _Out = None) -> None:
    """Name the first place where a run leaves its reference: phase, module, step, evidence, what to do next."""
    from mindspeed_mm.precision.comparing.band import Band
    from mindspeed_mm.precision.comparing.compare import compare
    from mindspeed_mm.precision.records.record import Record

    measured = Band.read(band) if band else None
    answer(compare(Record.open(reference), Record.open(candidate), measured), out)


@app.command("band")
def band_command(
    records: Annotated[list[Path], typer.Argument(help="Records of the reference, two or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("band.json"),
) -> None:
    """Measure how far runs of the reference lie apart that differ by rounding noise only (--precision-perturb)."""
    from mindspeed_mm.precision.comparing.band import Band
    from mindspeed_mm.precision.records.record import Record

    band = Band.measure([Record.open(folder) for folder in records])
    band.write(output)
    print(f"wrote {output}: {len(band.spreads)} tensors of {band.runs} runs; use it with compare --band {output}")


@app.command("replay")
def replay_command(
    what: Annotated[Replayed, typer.Argument(help="What to compute again.")],
    reference: _Reference,
    candidate: _Candidate,
    step: Annotated[int, typer.Option(min=0, help="The recorded step; 0 is the first of a run.")] = 0,
    site: Annotated[str, typer.Option(help="Pattern of module paths, for 'module'.")] = "*",
    out: _Out = None,
) -> None:
    """Compute a module, the optimizer's step or the loss from what the reference had, and compare the results."""
    from mindspeed_mm.precision.comparing import replays
    from mindspeed_mm.precision.records.record import Record

    ours, theirs = Record.open(reference), Record.open(candidate)
    if what is Replayed.optimizer:
        answer(replays.replay_optimizer(ours, theirs, step), out)
    if what is Replayed.loss:
        answer(replays.replay_loss(ours.step(step), theirs.step(step), replays.kept_logits(ours.step(step))), out)
    sites = replays.kept_sites(ours.step(step), site)
    if not sites:
        raise UserError(
            f"--site {site}: {ours.folder} has kept no call of such a module in step {step}; record it again with "
            f"--precision-capture steps={step},tensors={site}"
        )
    answer(replays.replay_modules(replays.candidate_model(theirs), ours.step(step), sites), out)


@app.command("invariants")
def invariants_command(
    run: Annotated[Path, typer.Argument(help="A record, or the --save folder that holds it.")], out: _Out = None
) -> None:
    """Check what holds in any run: reduced = sum of local gradients, replicas equal, clipping global. No reference."""
    from mindspeed_mm.precision.comparing.invariants import invariants
    from mindspeed_mm.precision.records.record import Record

    answer(invariants(Record.open(run)), out)


@app.command("lr0")
def lr0_command(reference: _Reference, candidate: _Candidate, out: _Out = None) -> None:
    """Compare two runs of --precision-mode lr0: rounding averages out over the steps, a bias stays."""
    from mindspeed_mm.precision.comparing.lr0 import compare_lr0, read_lr0

    answer(compare_lr0(read_lr0(reference, candidate)), out)


@app.command("doctor")
def doctor_command(
    reference: _Reference,
    candidate: _Candidate,
    band: _Band = None,
    lr0: Annotated[tuple[Path, Path] | None, typer.Option(help="Two runs of --precision-mode lr0.")] = None,
    min_steps: Annotated[int, typer.Option(min=1, help="Steps of a long curve.")] = 1000,
    out: _Out = None,
) -> None:
    """Go through the documented runbook, stop at the first stage that fails, say why and what to do."""
    from mindspeed_mm.precision.comparing.band import Band
    from mindspeed_mm.precision.comparing.doctor import Folders, doctor

    verdict, stages = doctor(Folders(reference, candidate, Band.read(band) if band else None, lr0), min_steps)
    for stage in stages:
        print(stage)
    answer(verdict, out)


@app.command("selftest")
def selftest_command(
    faults: Annotated[str, typer.Option(help="Only those with this in their name.")] = "",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute under autocast.")] = False,
) -> None:
    """Put known faults into a tiny model and check that compare finds them, and nothing where nothing is."""
    from mindspeed_mm.precision.selftest.faults import selftest

    results = []
    for result in selftest(bf16, faults):
        results.append(result)
        found = result.found
        text = "nothing" if found is None else f"{found.phase}, {found.site or 'the whole model'}, step {found.step}"
        print(f"{'right' if result.right else 'WRONG'}: {result.name}: {text}", flush=True)
    if not results:
        raise UserError(f"--faults {faults}: no fault has this in its name")
    print(f"{sum(result.right for result in results)} of {len(results)} answers are right")
    raise typer.Exit(int(not all(result.right for result in results)))
