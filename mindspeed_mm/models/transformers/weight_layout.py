"""Letting a user's subclass of a Transformers model read that model's published weights."""

from __future__ import annotations

from typing import Any


def share_weight_layout(model_cls: Any) -> None:
    """Give a subclass of a Transformers class the key names and layouts of its parent's files.

    The names on disk are often not those of the modules. Transformers finds the conversion by the class's name or
    its ``model_type``, and only for classes of its own or registered ones, so that ``class Mine(InternVL...)``
    would find no key. Nothing happens for Transformers' own classes and for code that derives from none of them.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    parent = next((base for base in model_cls.__mro__ if _has_weights_of_its_own(base)), None)
    if parent is None or parent is model_cls:
        return
    # The parent's name counts before its model_type, as it does for the parent itself.
    for known, name in (
        (parent.__name__, model_cls.__name__),
        (parent.config_class.model_type, parent.config_class.model_type),
    ):
        if (mapping := get_checkpoint_conversion_mapping(known)) is not None:
            register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
            return


def _has_weights_of_its_own(base: type) -> bool:
    return base.__module__.startswith("transformers.models.") and getattr(base, "config_class", None) is not None
