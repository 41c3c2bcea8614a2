"""Show what `mindspeed_mm.data.inspection` found: in the terminal, and as one HTML page that needs no other file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mindspeed_mm.data.inspection import Rendered, Summary, length_histogram
from mindspeed_mm.extras import import_extra

_THUMBNAIL = (320, 320)  # pixels at most
_SHOWN_BAD = 20
_STYLES = {True: "black on green", False: "dim"}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border-bottom: 1px solid #ddd; padding: .2em 1em .2em 0; text-align: left; vertical-align: top }
.sample { border: 1px solid #ddd; border-radius: 6px; padding: .8em 1em; margin: 1em 0; overflow-wrap: anywhere }
.text { white-space: pre-wrap; font: 13px/1.6 ui-monospace, monospace; color: #777 }
mark { background: #cdebcf; color: #111 }
img { max-width: 100%; margin: .3em .3em .3em 0; vertical-align: top }
.where { font-weight: 600 }
.bad { color: #b02020 }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p><mark>Marked</mark> text is trained on, the rest is read only. Pictures are shown as the processor gets them, made
smaller.</p>
{% for set in sets %}
<h2>{{ set.name }}</h2>
<table class="facts">
{% for name, value in set.summary.facts %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% if set.histogram %}<img class="histogram" alt="lengths" src="data:image/png;base64,{{ set.histogram }}">{% endif %}
{% if set.summary.bad %}
<h3>Bad rows</h3>
<table class="bad-rows">
{% for where, reason in set.summary.bad %}
<tr><td>{{ where }}</td><td class="bad">{{ reason }}</td></tr>
{% endfor %}
</table>
{% endif %}
<h3>Samples</h3>
{% for sample in set.samples %}
<div class="sample">
<div class="where">{{ sample.where }}</div>
{% if sample.problem %}
<div class="bad">{{ sample.problem }}</div>
{% else %}
<div>{{ sample.tokens }} tokens, {{ sample.targets }} trained on</div>
{% for picture in sample.pictures %}
<img class="picture" alt="picture {{ loop.index }}" src="data:image/jpeg;base64,{{ picture | thumbnail }}">
{% endfor %}
<div class="text">
{%- for piece in sample.pieces -%}
{%- if piece.trained %}<mark>{{ piece.text }}</mark>{% else %}{{ piece.text }}{% endif -%}
{%- endfor -%}
</div>
{% endif %}
</div>
{% endfor %}
{% endfor %}
</body>
</html>
"""


def show(console: Console, name: str, summary: Summary, samples: Sequence[Rendered]) -> None:
    """Print a data set to the terminal."""
    table = Table(title=Text(name), title_justify="left", title_style="bold", show_header=False)
    for fact, value in summary.facts:
        table.add_row(fact, value)
    console.print(table)
    for where, reason in summary.bad[:_SHOWN_BAD]:
        console.print(Text.assemble((f"{where}: ", "bold"), (reason, "red")), soft_wrap=True)
    if len(summary.bad) > _SHOWN_BAD:
        console.print(f"... and {len(summary.bad) - _SHOWN_BAD} more bad rows")
    for sample in samples:
        console.print(Rule(Text(sample.where)))
        if sample.problem:
            console.print(Text(sample.problem, "red"), soft_wrap=True)
            continue
        console.print(Text(f"{sample.tokens} tokens, {sample.targets} trained on", "bold"))
        for number, picture in enumerate(sample.pictures, start=1):
            console.print(Text(f"picture {number}: {picture.width} x {picture.height}", "magenta"))
        # Where there is no colour, in a file say, brackets show what is trained on.
        left, right = ("", "") if console.is_terminal else ("[[", "]]")
        text = Text()
        for piece in sample.pieces:
            text.append(f"{left}{piece.text}{right}" if piece.trained else piece.text, _STYLES[piece.trained])
        console.print(text, soft_wrap=True)


def page(title: str, sets: Mapping[str, tuple[Summary, Sequence[Rendered]]]) -> str:
    """Return an HTML page about the data sets, by their names. All text in it is escaped, pictures are inside it.

    Raises:
        UserError: jinja2 or matplotlib is missing.
    """
    jinja2 = import_extra("jinja2", "report", "the page of mindspeed-mm data inspect")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["thumbnail"] = _thumbnail
    content = [
        {
            "name": name,
            "summary": summary,
            "samples": samples,
            "histogram": b64encode(length_histogram(summary, name)).decode() if len(summary.uncut) else "",
        }
        for name, (summary, samples) in sets.items()
    ]
    return str(environment.from_string(_PAGE).render(title=title, sets=content))


def _thumbnail(picture: Any) -> str:
    small = picture.copy()
    small.thumbnail(_THUMBNAIL)
    file = BytesIO()
    small.save(file, format="JPEG", quality=85)
    return b64encode(file.getvalue()).decode()
