"""Calling the user's callbacks in any of their documented forms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from mindspeed_mm.data.iterators import iterate
from mindspeed_mm.errors import UserError

Iterators = tuple["Iterator[Any] | None", dict[str, Iterator[Any]], dict[str, Iterator[Any]]]
"""For training; for validation and test by the name of the data set, which is empty where there is only one."""


def call_model_provider(
    provider: Callable[..., Any],
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> nn.Module:
    """Call ``model_provider`` with those of the keywords ``pre_process``, ``post_process``, ``vp_stage`` it accepts.

    Raises:
        UserError: it returned something that is not a module.
    """
    accepted = inspect.signature(provider).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    offered = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
    # Published scripts pass what they are given on to models that know no vp_stage.
    keywords = {k: v for k, v in offered.items() if k in accepted or (takes_any and v is not None)}
    model = provider(**keywords)
    if not isinstance(model, nn.Module):
        raise UserError(f"model_provider returned a {type(model).__name__}: it must return a torch.nn.Module.")
    return model


def call_dataset_provider(provider: Callable[..., Any], sample_counts: list[int]) -> Iterators:
    """Return the train, validation and test iterators; there may be several for validation and test, in a dict.

    The provider is called with the three sample counts if it takes an argument, with none if not. Loaders and
    other iterables become endless iterators; iterators are taken as they are.

    Raises:
        UserError: it did not return three values.
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(provider).parameters.values()
    takes_counts = any(p.kind in positional or p.kind is p.VAR_POSITIONAL for p in parameters)
    loaders = provider(sample_counts) if takes_counts else provider()
    if not isinstance(loaders, (tuple, list)) or len(loaders) != 3:
        found = f"{len(loaders)} values" if isinstance(loaders, (tuple, list)) else f"a {type(loaders).__name__}"
        raise UserError(
            f"train_valid_test_datasets_provider returned {found}: it must return the train, validation and test "
            "loaders, each of which may be None."
        )
    train, valid, test = loaders
    return _to_iterator("train", train), _to_iterators("valid", valid), _to_iterators("test", test)


def other_batch_size(train: Any, micro_batch_size: int) -> str | None:
    """Return what to tell about a training loader whose batches are not the micro batches of the command line."""
    size = getattr(getattr(train, "loader", None), "batch_size", None)
    if not isinstance(size, int) or size == micro_batch_size:
        return None
    return (
        f"the training loader has batch_size {size} and --micro-batch-size is {micro_batch_size}: consumed samples are "
        f"counted as if a micro batch had {micro_batch_size}. Give both the same number."
    )


def _to_iterators(name: str, loaders: Any) -> dict[str, Iterator[Any]]:
    named = loaders if isinstance(loaders, Mapping) else {"": loaders}
    iterators = {key: _to_iterator(f"{name} '{key}'" if key else name, loader) for key, loader in named.items()}
    return {key: iterator for key, iterator in iterators.items() if iterator is not None}


def _to_iterator(name: str, loader: Any) -> Iterator[Any] | None:
    if loader is None:
        return None
    try:
        iterator = iter(loader) if hasattr(loader, "__next__") else iterate(loader)
    except TypeError:
        iterator = None
    if iterator is None or not hasattr(loader, "__iter__"):
        raise UserError(
            f"train_valid_test_datasets_provider returned a {type(loader).__name__} for {name}: it must be a "
            "DataLoader, an iterable of batches, an iterator or None."
        )
    return iterator
