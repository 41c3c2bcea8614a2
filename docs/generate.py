"""Bring the generated parts of README.md and docs/ up to date.

Usage, from the root of the repository: ``python docs/generate.py``. Two kinds of blocks are replaced, each up to its
``<!-- end -->``: ``<!-- flags -->`` by the table of ``python -m mindspeed_mm.arguments.reference``, and
``<!-- file: path -->`` by the content of that file.
"""

from __future__ import annotations

import re
from pathlib import Path

from mindspeed_mm.arguments.reference import table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(<!-- (flags|file: (\S+)) -->\n).*?(<!-- end -->)", re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json"}


def render(text: str) -> str:
    """Return ``text`` with its generated blocks made anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_content(block[3])}\n{block[4]}", text)


def _content(path: str | None) -> str:
    if path is None:
        return "\n".join(table()).rstrip()
    file = ROOT / path
    # The name beside the language tells the reader, and the tests, which file the block is.
    return f"```{_LANGUAGES[file.suffix]} {file.name}\n{file.read_text(encoding='utf-8').rstrip()}\n```"


def main() -> None:
    """Rewrite the pages that are out of date."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := render(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"updated {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
