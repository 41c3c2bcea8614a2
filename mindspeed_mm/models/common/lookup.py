"""Reading one key of a nested configuration, whatever kind of tree it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def lookup(config: Any, path: str, default: Any = None) -> Any:
    """Return the value at a dotted path, or ``default`` where a part of the path is missing or null.

    Args:
        config: nested mappings or objects with attributes, such as the model.json object.
        path: for example ``image_encoder.vision_encoder.freeze``.
        default: returned instead of a missing or null value.
    """
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
        if config is None:
            return default
    return config
