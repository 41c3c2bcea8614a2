"""A tree of keys that the user owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mindspeed_mm.errors import did_you_mean

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


class FreeForm(dict[str, Any]):
    """A dict whose keys are also attributes, at every depth: ``cfg.predictor.patch_size[0]``.

    Nested mappings, also those inside lists, become ``FreeForm`` when they are set. A key that has the name of a
    dict method (``items``, ``copy``) is reached as ``cfg["items"]``. As an attribute, ``dtype`` is a dtype of torch:
    ``cfg.ae.dtype`` is ``torch.bfloat16`` where ``cfg.ae["dtype"]`` is ``"bf16"``. The documented name of this class
    is ``ConfigReader``.
    """

    __slots__ = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.update(*args, **kwargs)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _adopt(value))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Like ``dict.update``; nested mappings become ``FreeForm`` here too."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Like ``dict.setdefault``; a nested mapping becomes ``FreeForm`` here too."""
        if key not in self:
            self[key] = default
        return self[key]

    def __getattr__(self, key: str) -> Any:
        try:
            return _torch_dtype(self[key]) if key == "dtype" else self[key]
        except KeyError:
            raise AttributeError(f"no key '{key}' here.{did_you_mean(key, self)} Keys: {', '.join(self)}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        if key not in self:
            raise AttributeError(f"no key '{key}' to delete")
        del self[key]

    def to_dict(self) -> dict[str, Any]:
        """Return a copy made of plain dicts and lists."""
        return {key: _release(value) for key, value in self.items()}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept any object with string keys, and dump as plain dicts."""
        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema()),
            serialization=core_schema.plain_serializer_function_ser_schema(cls.to_dict),
        )


def _adopt(value: Any) -> Any:
    if isinstance(value, Mapping) and not isinstance(value, FreeForm):
        return FreeForm(value)
    if isinstance(value, list):
        return [_adopt(item) for item in value]
    return value


def _release(value: Any) -> Any:
    if isinstance(value, FreeForm):
        return value.to_dict()
    if isinstance(value, list):
        return [_release(item) for item in value]
    return value


def _torch_dtype(value: Any) -> Any:
    """Return the dtype of torch that a text names, anything else as it is."""
    import torch

    name = _SHORT_DTYPES.get(value, value) if isinstance(value, str) else None
    dtype = getattr(torch, name.removeprefix("torch."), None) if name else None
    return dtype if isinstance(dtype, torch.dtype) else value
