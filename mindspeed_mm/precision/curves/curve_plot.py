"""Pictures of two runs' curves: loss, difference, gradient norm."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from mindspeed_mm.extras import import_extra
from mindspeed_mm.precision.curves.curves import GRAD_NORM, LOSS, Curve, align

_COLOURS = {"reference": "#1f5fa8", "candidate": "#c8501e", "reference, second run": "#8fb4d9"}


def draw(reference: Curve, candidate: Curve, second: Curve | None = None, form: str = "png") -> bytes:
    """Return a picture of the curves.

    Args:
        reference: the run to reach.
        candidate: the run in question.
        second: another run of the reference; its noise is drawn behind the difference.
        form: ``png`` or ``svg``.

    Raises:
        UserError: matplotlib is missing.
    """
    import_extra("matplotlib", "report", "a picture of the curves")
    from matplotlib.figure import Figure

    named = {"reference": reference, "reference, second run": second, "candidate": candidate}
    runs = {name: curve for name, curve in named.items() if curve is not None}
    norms = any(curve.points.get(GRAD_NORM) for curve in runs.values())
    figure = Figure(figsize=(9, 8 if norms else 5.5), layout="constrained")
    axes = figure.subplots(3 if norms else 2, sharex=True)
    _lines(axes[0], runs, LOSS, "loss")
    axes[0].legend(frameon=False)
    for name, other in (("reference, second run", second), ("candidate", candidate)):
        if other is not None:
            pair = align(reference, other, LOSS).finite
            axes[1].plot(pair.steps, pair.difference, color=_COLOURS[name], linewidth=0.9)
    axes[1].axhline(0, color="#888", linewidth=0.6)
    axes[1].set_ylabel("loss - reference")
    if norms:
        _lines(axes[2], runs, GRAD_NORM, "gradient norm")
    axes[-1].set_xlabel("step")
    file = BytesIO()
    # The file has to be the same every time it is made.
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    figure.savefig(file, format=form, dpi=120, metadata=metadata)
    return file.getvalue()


def _lines(axis: Any, runs: dict[str, Curve], name: str, label: str) -> None:
    for run, curve in runs.items():
        points = curve.points.get(name, {})
        steps = sorted(points)
        axis.plot(steps, [points[step] for step in steps], label=run, color=_COLOURS[run], linewidth=1.0)
    axis.set_ylabel(label)
    axis.spines[["top", "right"]].set_visible(False)
