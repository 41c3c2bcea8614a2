"""Rules of the code base that are about its shape, not about what it computes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mindspeed_mm"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted(ROOT.glob("pretrain_*.py"))
MAX_LINES = 400

DEVICES = ("cuda", "npu")
DEVICE_MODULES = ("torch.cuda", "torch.npu", "torch_npu")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` for a chain of attributes that starts at a name, otherwise an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def _names_device(text: str) -> bool:
    """Tell whether a string is a device, ``cuda`` or ``npu:0``, or a module of one, ``torch.cuda`` or ``torch_npu``."""
    device, _, index = text.partition(":")
    return (device in DEVICES and (not index or index.isdigit())) or _is_device_module(text)


def _is_device_module(dotted: str) -> bool:
    return any(dotted == module or dotted.startswith(module + ".") for module in DEVICE_MODULES)


def device_names(source: str) -> Iterator[str]:
    """Yield ``line: what`` for every place in ``source`` that names a device other than the CPU."""
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if _is_device_module(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found = [name for name in candidates if _is_device_module(name)]
        elif isinstance(node, ast.Attribute):
            dotted = _dotted(node)
            if dotted in DEVICE_MODULES or (node.attr in DEVICES and not dotted.startswith("self.")):
                found = [dotted or f".{node.attr}"]
        elif isinstance(node, ast.Name) and node.id == "torch_npu":
            found = [node.id]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _names_device(node.value):
            found = [repr(node.value)]
        yield from (f"{node.lineno}: {what}" for what in found)


@pytest.mark.parametrize(
    "source",
    [
        "import torch_npu",
        "import torch.cuda.amp",
        "from torch import cuda",
        "from torch.cuda import Stream",
        "torch.cuda.synchronize()",
        "torch.npu.current_device()",
        "tensor.cuda()",
        "tensor.to('cuda')",
        "torch.device('npu:0')",
        "importlib.import_module('torch_npu')",
    ],
)
def test_device_lint_sees(source: str) -> None:
    assert list(device_names(source))


@pytest.mark.parametrize("source", ["'barracuda'", "'npu:hccl,cpu:gloo'", "torch.accelerator.synchronize()", "'cpu'"])
def test_device_lint_leaves_alone(source: str) -> None:
    assert not list(device_names(source))


def test_only_the_accelerator_layer_names_devices() -> None:
    outside = [path for path in SOURCES if (PACKAGE / "accelerator") not in path.parents]
    found = [f"{_name(path)}:{where}" for path in outside for where in device_names(path.read_text("utf-8"))]
    assert not found, "move the decision into mindspeed_mm/accelerator:\n" + "\n".join(found)


def test_modules_are_short() -> None:
    lengths = {_name(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines; split where the ideas split: {long}"


def _public_without_docstring(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    if not ast.get_docstring(tree):
        yield f"{_name(path)}: the module"
    for node in tree.body:
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ):
            yield f"{_name(path)}:{node.lineno}: {node.name}"


def test_public_names_are_documented() -> None:
    public = [path for path in MODULES if not path.stem.startswith("_") or path.stem == "__init__"]
    found = [where for path in public for where in _public_without_docstring(path)]
    assert not found, "add a docstring:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("mindspeed_mm", ("torch", "megatron", "transformers", "datasets", "pydantic")),
        ("mindspeed_mm.arguments", ("torch", "megatron", "transformers", "datasets")),
        ("mindspeed_mm.configs", ("torch", "megatron", "transformers", "datasets")),
    ],
)
def test_import_is_cheap(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(name for name in {unwanted!r} if name in sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not answer.stdout.split(), f"import {module} also loads {answer.stdout.strip()}"
