"""All checks of two runs on one HTML page that needs no other file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.extras import import_extra
from mindspeed_mm.precision.comparing.data_diff import judge_data, placed
from mindspeed_mm.precision.curves.criteria import Criterion, judge_curves
from mindspeed_mm.precision.curves.curve_plot import draw
from mindspeed_mm.precision.curves.curves import read_curve
from mindspeed_mm.precision.finding import NAME, Finding, Measurement, Verdict
from mindspeed_mm.precision.records.record import Record
from mindspeed_mm.precision.settings.config_diff import DIFFERENT, Row, judge, rows
from mindspeed_mm.precision.settings.config_side import understand
from mindspeed_mm.precision.settings.config_sources import read_sources

_TEMPLATE = Path(__file__).with_name("report.html")
_ENVIRONMENT = ("versions", "device", "backend", "world_size", "git", "environment", "determinism", "command")
_MOST_ROWS = 5000
_MEASURED = ("compare", "invariants", "data-diff", "curve", "lr0", "replay")
_CAUSES = ("data-diff", "compare", "invariants", "replay", "lr0", "curve", "config-diff")


@dataclass
class Report:
    """What is known of two runs.

    Attributes:
        reference: where it was read.
        candidate: the same.
        verdicts: of the checks that could be made.
        curves: a picture as SVG, empty without curves.
        criteria: of the curves.
        settings: that differ.
        environment: name and both values of what differs around the runs.
        tree: class of each module by path.
    """

    reference: str
    candidate: str
    verdicts: list[Verdict] = field(default_factory=list)
    curves: str = ""
    criteria: list[Criterion] = field(default_factory=list)
    settings: list[Row] = field(default_factory=list)
    environment: list[tuple[str, str, str]] = field(default_factory=list)
    tree: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> Verdict:
        """One verdict of all: the first finding is the earliest cause. Settings alone decide nothing else can be."""
        order = {check: i for i, check in enumerate(_CAUSES)}
        measured = [v for v in self.verdicts if v.check in _MEASURED]
        sources = sorted(measured or self.verdicts, key=lambda v: order.get(v.check, len(order)))
        verdict = Verdict("report", findings=[finding for source in sources for finding in source.findings])
        if not any(source.exit_code == 0 for source in sources):
            reasons = [source.undecided for source in sources if source.undecided]
            verdict.undecided = "; ".join(reasons) or "nothing could be checked"
        verdict.table = [row for source in sources for row in source.table]
        return verdict


def collect(reference: Path, candidate: Path, found: Sequence[Path] = (), min_steps: int = 1000) -> Report:
    """Make the checks that the two places allow: settings, samples, modules, curves.

    Args:
        reference: the folder of a run (``--save``), or a record.
        candidate: the same.
        found: folders with the ``verdict.json`` of checks made before; ``compare`` is then not made again.
        min_steps: see `judge_curves`.

    Raises:
        UserError: nothing at all can be compared.
    """
    report = Report(str(reference), str(candidate))
    report.verdicts += [read_verdict(folder) for folder in found]
    for check in (_settings, _records, lambda r, a, b: _curves(r, a, b, min_steps)):
        check(report, reference, candidate)
    if not report.verdicts:
        raise UserError(
            f"{reference} and {candidate} hold nothing that can be compared: neither records, nor metrics.jsonl, nor "
            "run_manifest.json on both sides; give the --save folders of two runs"
        )
    return report


def read_verdict(folder: Path) -> Verdict:
    """Read what ``Verdict.write`` has written.

    Raises:
        UserError: there is none in the folder.
    """
    path = folder / NAME if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        findings = [Finding(**{**item, "sites": tuple(item["sites"])}) for item in content["findings"]]
        table = path.with_name("table.jsonl")
        lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
        measured = [{k: v for k, v in json.loads(line).items() if k != "in_band"} for line in lines]
        return Verdict(
            content["check"], findings, content["notes"], content["undecided"], [Measurement(**m) for m in measured]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a verdict of mindspeed-mm precision ({error}); pass the folder of --out"
        ) from error


def _settings(report: Report, reference: Path, candidate: Path) -> None:
    sources = [_or_none(lambda place=place: read_sources(str(place))) for place in (reference, candidate)]  # type: ignore[misc]
    if sources[0] and sources[1]:
        sides = [understand(source) for source in sources if source]
        report.verdicts.append(judge(*sides))
        report.settings = [row for row in rows(*sides) if row.outcome == DIFFERENT]
    report.environment = list(_environment(_manifest(reference), _manifest(candidate)))


def _records(report: Report, reference: Path, candidate: Path) -> None:
    ours, theirs = (_or_none(lambda place=place: Record.open(place)) for place in (reference, candidate))  # type: ignore[misc]
    if ours is None or theirs is None or not ours.steps:
        return
    report.tree = ours.step(ours.steps[0]).tree
    report.verdicts.append(judge_data(placed(ours), placed(theirs)))
    if not any(verdict.check == "compare" for verdict in report.verdicts):
        from mindspeed_mm.precision.comparing.compare import compare

        report.verdicts.append(compare(ours, theirs))


def _curves(report: Report, reference: Path, candidate: Path, min_steps: int) -> None:
    ours, theirs = (_or_none(lambda place=place: read_curve(place)) for place in (reference, candidate))  # type: ignore[misc]
    if ours is None or theirs is None:
        return
    verdict, report.criteria = judge_curves(ours, theirs, min_steps=min_steps)
    report.verdicts.append(verdict)
    picture = draw(ours, theirs, form="svg").decode()
    report.curves = re.sub(r"<metadata>.*?</metadata>", "", picture[picture.index("<svg") :], flags=re.DOTALL)


def _or_none(read: Callable[[], Any]) -> Any:
    """Return what is read, None where a place does not hold that kind of thing."""
    try:
        return read()
    except UserError:
        return None


def _manifest(folder: Path) -> dict[str, Any]:
    for name in ("run_manifest.json", "manifest.json", "precision/manifest.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            return dict(content["starts"][-1] if "starts" in content else content)
    return {}


def _environment(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    for name in _ENVIRONMENT:
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in sorted(a.keys() | b.keys()):
                if a.get(key) != b.get(key):
                    yield f"{name}: {key}", str(a.get(key, "")), str(b.get(key, ""))
        elif a != b and name in ours and name in theirs:
            yield name, _words(a), _words(b)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass
class Node:
    """A module on the page: its mark is ``first``, ``later``, ``good`` or empty where nothing was recorded of it."""

    name: str
    kind: str
    mark: str = ""
    worst: str = ""
    open: bool = False
    children: list[Node] = field(default_factory=list)


def module_tree(tree: Mapping[str, str], first: Finding | None, table: Iterable[Measurement]) -> Node | None:
    """Return the modules as a tree, marked by what was measured; the way to the first that differs is open.

    The marks are about the phase and step of the first finding: what came before it agrees there.
    """
    if not tree:
        return None
    table = list(table)
    if first is not None:
        table = [row for row in table if (row.step, row.phase) == (first.step, first.phase)] or table
    worst: dict[str, float] = {}
    bad: set[str] = set()
    for row in table:
        site = row.site
        while site and site not in tree:  # a parameter belongs to its module
            site = site.rpartition(".")[0]
        worst[site] = max(worst.get(site, 0.0), row.relative)
        if not row.in_band:
            bad.add(site)
    culprits = {first.site, *first.sites} if first else set()
    culprits = {site if site in tree else site.rpartition(".")[0] for site in culprits}
    nodes: dict[str, Node] = {}
    for path, kind in tree.items():
        mark = "first" if path in culprits else "later" if path in bad else "good" if path in worst else ""
        node = Node(path.rpartition(".")[2] or "model", kind, mark, f"{worst[path]:.2g}" if path in worst else "")
        node.open = not path or any(site.startswith(f"{path}.") for site in culprits)
        nodes[path] = node
        if path:
            parent = path.rpartition(".")[0]
            while parent and parent not in nodes:
                parent = parent.rpartition(".")[0]
            if parent in nodes:
                nodes[parent].children.append(node)
    return nodes.get("") or next(iter(nodes.values()))


def page(report: Report, title: str = "Precision alignment") -> str:
    """Return the page. All text in it is escaped; the picture is inside it.

    Raises:
        UserError: jinja2 is missing.
    """
    jinja2 = import_extra("jinja2", "report", "the report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    whole = report.whole
    checks = [
        {**{name: getattr(v, name) for name in ("check", "exit_code", "undecided", "notes")}, "answer": _answer(v)}
        for v in report.verdicts
    ]
    content = {
        "title": title,
        "reference": report.reference,
        "candidate": report.candidate,
        "answer": _answer(whole),
        "first": whole.first,
        "checks": checks,
        "curves": report.curves,
        "criteria": report.criteria,
        "tree": module_tree(report.tree, whole.first, whole.table),
        "findings": [(v.check, f) for v in report.verdicts if v.check != "config-diff" for f in v.findings],
        "settings": report.settings,
        "environment": report.environment,
        "table": whole.table[:_MOST_ROWS],
    }
    return str(environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(content))


def _answer(verdict: Verdict) -> str:
    return str(verdict.to_json()["verdict"])
