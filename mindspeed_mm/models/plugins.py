"""Loading a user's own module, so that the classes it registers are known."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from mindspeed_mm.errors import UserError


def load_plugin(path_or_module: str) -> ModuleType:
    """Import a Python file or a dotted module once, and return it.

    A file is imported under its own name with its folder on the module path, as ``python file.py`` would do: it
    can import its neighbours, and data-loader workers can import its classes.

    Args:
        path_or_module: ``path/to/file.py`` or ``package.module``.

    Raises:
        UserError: there is no such file or module, or importing it failed; the message has the line.
    """
    is_file = path_or_module.endswith(".py") or Path(path_or_module).exists()
    try:
        return _import_file(Path(path_or_module)) if is_file else importlib.import_module(path_or_module)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{path_or_module}.".startswith(f"{error.name}."):
            raise UserError(
                f"--plugin: there is no file and no module '{path_or_module}'. "
                f"Give the path of a .py file, or a module that Python finds from {Path.cwd()}."
            ) from error
        raise _failed(path_or_module, error) from error
    except Exception as error:
        raise _failed(path_or_module, error) from error


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"--plugin: there is no file '{path}'.")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    found = importlib.util.find_spec(path.stem) if loaded is None else loaded.__spec__
    if found is not None and found.origin != str(path):
        raise UserError(f"--plugin: '{path}' would hide the module '{path.stem}'. Rename the file.")
    if found is None:
        sys.path.append(str(path.parent))
    return importlib.import_module(path.stem)


def _failed(plugin: str, error: Exception) -> UserError:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if isinstance(error, SyntaxError):  # the frame is the importer's, the line is in the error
        place = f" at {error.filename}:{error.lineno}"
    return UserError(f"--plugin: '{plugin}' could not be imported: {type(error).__name__}{place}: {error}")
