"""Typed config objects, and how they are loaded from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from mindspeed_mm.configs.freeform import FreeForm
from mindspeed_mm.configs.problems import describe_problems
from mindspeed_mm.configs.reading import read_file
from mindspeed_mm.errors import UserError

__all__ = ["Config", "Count", "Fraction", "FreeForm", "InputPath", "Positive", "load_config", "read_file"]


class Config(BaseModel):
    """One object of a config file: closed (an unknown key is an error), typed, and checked on assignment.

    Types are strict: ``"8"`` is no number and ``"false"`` is no bool. ``hasattr(cfg, key)`` is true for every key
    the class knows; ``key in cfg`` asks whether the key was given, in the file or by an assignment.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True, protected_namespaces=()
    )

    retired: ClassVar[dict[str, str]] = {}
    """Keys that older files have, and what to write instead."""
    unknown_key_advice: ClassVar[str] = ""
    """Where a key that the class does not know may go."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``, or ``default`` when the key is unknown or its value is null."""
        value = getattr(self, key) if key in type(self).model_fields else None
        return default if value is None else value

    def to_dict(self) -> dict[str, Any]:
        """Return all keys and values, defaults included, as plain dicts and lists."""
        return self.model_dump()

    def __contains__(self, key: object) -> bool:
        return key in self.model_fields_set


ConfigType = TypeVar("ConfigType", bound=Config)


def load_config(cls: type[ConfigType], path: str | Path) -> ConfigType:
    """Read ``path`` (JSON or YAML) into a ``cls``.

    Raises:
        UserError: the file cannot be read, or it has keys or values that ``cls`` does not accept. All of them are
            listed, a line each, with the file, the full path of the key, what is wrong and what to do.
    """
    document = read_file(path)
    try:
        return cls.model_validate(document, context={"folder": Path(path).parent})
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {problem}" for problem in describe_problems(cls, error))) from None


def beside_config(value: str, info: ValidationInfo) -> str:
    """Resolve a relative path that does not exist in the current folder against the folder of the config file."""
    folder = (info.context or {}).get("folder")
    if folder is None or not value or Path(value).exists() or not (folder / value).exists():
        return value
    return str(folder / value)


InputPath = Annotated[str, AfterValidator(beside_config)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
