"""What a data set is made of, in numbers and in rendered samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from typing import Any

import numpy as np

from mindspeed_mm.data.datasets import ConversationDataset
from mindspeed_mm.data.encoding import IGNORE_INDEX
from mindspeed_mm.data.images import load_image
from mindspeed_mm.data.preparation import Prepared
from mindspeed_mm.errors import UserError
from mindspeed_mm.extras import import_extra

_MAX_PICTURES = 1000  # whose headers are read for the statistics
_RUN = 4  # as many equal tokens in a row are written as one with a number


@dataclass(frozen=True)
class Summary:
    """A data set in numbers.

    Attributes:
        facts: name and value, as text.
        bad: row and reason of each bad sample.
        lengths: tokens of each good sample, before and after ``--seq-length`` cut it.
        limit: ``--seq-length``.
    """

    facts: list[tuple[str, str]]
    bad: list[tuple[str, str]]
    uncut: np.ndarray
    lengths: np.ndarray
    limit: int | None


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered sample.

    Attributes:
        text: of its tokens.
        trained: whether the model learns to write it.
    """

    text: str
    trained: bool


@dataclass(frozen=True)
class Rendered:
    """A sample to look at: where it comes from, its pieces, its pictures as PIL images, or why it is bad."""

    where: str
    tokens: int
    targets: int
    pieces: list[Piece]
    pictures: list[Any]
    problem: str | None = None


def summarise(dataset: ConversationDataset, prepared: Prepared) -> Summary:
    """Return the numbers of a prepared data set.

    Args:
        dataset: whose pictures are looked at, up to a thousand of them, evenly spread.
        prepared: what is known of its samples.
    """
    good = np.ones(len(dataset), bool)
    good[list(prepared.bad)] = False
    tokens, uncut, targets, patches = (
        prepared.column(name)[good] for name in ("tokens", "uncut", "targets", "patches")
    )
    limit = dataset.encoder.options.seq_length
    facts = [("rows", f"{len(dataset):,}"), ("bad rows", f"{len(prepared.bad):,}")]
    if limit is not None:
        cut = uncut > tokens
        lost = f", {int((uncut - tokens).sum()):,} tokens lost" if cut.any() else ""
        facts.append((f"cut at {limit:,} tokens", f"{int(cut.sum()):,}{lost}"))
    if len(tokens):
        facts.append(("tokens", f"{int(tokens.sum()):,}, of which {targets.sum() / tokens.sum():.1%} are trained on"))
        facts.append(("tokens of a row", _spread(tokens)))
        facts.append(("trained tokens of a row", _spread(targets)))
    facts += _about_media(dataset)
    if patches.any():
        facts.append(("vision patches of a row that has some", _spread(patches[patches > 0])))
    bad = [(dataset.where(index), reason) for index, reason in sorted(prepared.bad.items())]
    return Summary(facts, [(where, _without(where, reason)) for where, reason in bad], uncut, tokens, limit)


def render_samples(dataset: ConversationDataset, count: int) -> Iterator[Rendered]:
    """Yield ``count`` samples, evenly spread over the data set."""
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist():
        where = dataset.where(index)
        try:
            sample = dataset.measure(index).sample
        except UserError as error:
            yield Rendered(where, 0, 0, [], [], _without(where, str(error)))
            continue
        options = dataset.encoder.options
        pictures = [
            load_image(path, where, options.image_max_pixels, options.image_min_pixels)
            for path in dataset.rows[index]["images"] or ()
        ]
        ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        targets = sum(label != IGNORE_INDEX for label in labels[1:])
        yield Rendered(where, len(ids), targets, list(pieces(ids, labels, dataset.encoder.tokenizer)), pictures)


def pieces(ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[Piece]:
    """Yield the text of a sample, cut where training on it begins and ends.

    The first token is never trained on: nothing comes before it.
    """
    trained = [number > 0 and label != IGNORE_INDEX for number, label in enumerate(labels)]
    for is_trained, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        yield Piece(_decode([token for token, _ in group], tokenizer), is_trained)


def length_histogram(summary: Summary, name: str) -> bytes:
    """Return a PNG of the lengths in tokens, with the limit.

    Raises:
        UserError: matplotlib is missing.
    """
    import_extra("matplotlib", "report", "the histogram of mindspeed-mm data inspect")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(summary.uncut, bins=min(60, max(1, len(np.unique(summary.uncut)))), color="#4878a8")
    if summary.limit is not None:
        axes.axvline(summary.limit, color="#c04040", label=f"--seq-length {summary.limit}")
        axes.legend()
    axes.set(xlabel="tokens of a sample, before any cut", ylabel="samples", title=name)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _decode(ids: list[int], tokenizer: Any) -> str:
    parts: list[str] = []
    plain: list[int] = []
    for token, group in groupby(ids):
        count = len(list(group))
        if count < _RUN:
            plain += [token] * count
            continue
        parts += [tokenizer.decode(plain), f"{tokenizer.decode([token])} × {count}"]
        plain = []
    return "".join([*parts, tokenizer.decode(plain)])


def _spread(values: np.ndarray) -> str:
    low, median, high, most = np.percentile(values, (0, 50, 95, 100))
    if low == most:
        return f"{low:,.0f}"
    return f"{low:,.0f} to {most:,.0f}, mean {values.mean():,.1f}, median {median:,.0f}, 95 % up to {high:,.0f}"


def _about_media(dataset: ConversationDataset) -> list[tuple[str, str]]:
    from PIL import Image

    columns = dataset.rows[:]
    turns = [len(messages) for messages in columns["messages"] if messages]
    facts = [("messages of a row", _spread(np.array(turns)))] if turns else []
    for kind in ("images", "videos", "audios"):
        files = [path for paths in columns[kind] for path in paths or ()]
        if files:
            rows = sum(bool(paths) for paths in columns[kind])
            facts.append((kind, f"{len(files):,}, {len(set(files)):,} different, in {rows:,} rows"))
    pictures = sorted({path for paths in columns["images"] for path in paths or ()})
    sizes = []
    for path in pictures[:: max(1, len(pictures) // _MAX_PICTURES)]:
        try:
            with Image.open(path) as picture:
                sizes.append(picture.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # it is among the bad rows
    if sizes:
        width, height = (np.array(side) for side in zip(*sizes, strict=True))
        facts += [("width of an image", _spread(width)), ("height of an image", _spread(height))]
        facts.append(("pixels of an image", _spread(width * height)))
    return facts


def _without(where: str, reason: str) -> str:
    return reason.removeprefix(f"{where}: ")
