"""Under which name the cache keeps prepared samples: everything that decides what they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

FORMAT = 1  # of the files in the cache; raise it when they or the encoding of a sample change

# What a processor is built from. Weights beside them decide nothing here and take minutes to read.
_PROCESSOR_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_PACKAGES = ("transformers", "tokenizers", "pillow", "numpy")


def describe_samples(options: Mapping[str, Any], files: Iterable[Path], processor: Path) -> dict[str, Any]:
    """Return what prepared samples depend on, as plain values.

    Media files are not read: a picture that changes is found when its sample is fetched.

    Args:
        options: of reading and encoding; JSON values.
        files: with the rows; their content counts, not their names.
        processor: Hugging Face folder; the content of its processor, tokenizer and template files counts.
    """
    parts = sorted(path for path in processor.glob("*") if path.suffix in _PROCESSOR_FILES)
    return {
        "format": FORMAT,
        "packages": {name: version(name) for name in _PACKAGES},
        "rows": [_digest(path) for path in files],
        "processor": {path.name: _digest(path) for path in parts if not path.name.endswith(".index.json")},
        "options": dict(options),
    }


def key_of(description: Mapping[str, Any]) -> str:
    """Return the name of the folder for samples of this description: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder of all caches: ``cache_dir``, else one in the user's own cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_dir) if cache_dir else Path(home) / "mindspeed_mm" / "data"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
