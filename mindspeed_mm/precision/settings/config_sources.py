"""The files that configure a run, of whichever system, as flat names and values. What a file is, its content says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.settings.config_keys import SYSTEMS, names_of
from mindspeed_mm.precision.settings.shell_flags import read_script

_TABLE_LINE = re.compile(r"^\W*(?:\[[^\]]*\]:?)?\s*(\w+) \.{3,} (.*?)\s*$", re.MULTILINE)
_FILES_OF_A_RUN = (
    "config.json",
    "adapter_config.json",
    "training_args.json",
    "training_args.bin",
    "args.json",
    "*deepspeed*.json",
    "ds_*.json",
    "zero*.json",
    "*.toml",
    "*.yaml",
    "*.yml",
    "*.sh",
    "*.log",
)
_OUR_FILES = {"mm_model": "model", "mm_data": "data", "fsdp2_config_path": "fsdp2"}
_DEEPSPEED_ADAM = {
    "betas.0": 0.9,
    "betas.1": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "adam_w_mode": True,
    "bias_correction": True,
}
_READABLE = (
    "a run of MindSpeed-MM (run_manifest.json), a launch script or log with Megatron flags, config.json, "
    "training_args.bin or .json of Hugging Face, a DeepSpeed json, a MindSpore Transformers yaml, a torchtitan toml"
)


@dataclass
class Source:
    """What one file says.

    Attributes:
        system: whose names these are, one of ``config_keys.SYSTEMS``.
        place: the file.
        values: by flat name; nested keys are joined by dots, elements of lists have a number.
        complete: what is not there is not set, rather than at the system's default.
        words: the values are words of a command line, and may be followed by others.
        unreadable: names whose values come from elsewhere.
    """

    system: str
    place: str
    values: dict[str, Any]
    complete: bool = False
    words: bool = False
    unreadable: list[str] = field(default_factory=list)


def read_sources(place: str) -> list[Source]:
    """Read what configures one side: a file, the folder of a run, or several of both with commas between them.

    Raises:
        UserError: a file is not there, cannot be read, or is none of a known system.
    """
    found = [source for part in place.split(",") for source in _read(Path(part.strip()))]
    if not found:
        raise UserError(f"{place}: nothing that configures a run; give {_READABLE}")
    return found


def _read(path: Path) -> Iterator[Source]:
    if path.is_dir():
        for name in ("run_manifest.json", "precision/manifest.json", "manifest.json"):
            if (path / name).is_file():
                found = list(_read_file(path / name))
                yield from found
                if any(source.system == "ours" for source in found):
                    return
                break  # another trainer's record; its files lie beside it
        files = dict.fromkeys(file for pattern in _FILES_OF_A_RUN for file in sorted(path.glob(pattern)))
        for file in files:
            if not (file.suffix == ".bin" and file.with_suffix(".json") in files):
                yield from _read_file(file, in_folder=True)
    elif path.is_file():
        yield from _read_file(path)
    else:
        raise UserError(f"{path}: there is no such file or folder; give {_READABLE}")


def _read_file(path: Path, in_folder: bool = False) -> Iterator[Source]:
    if path.suffix == ".bin":
        yield _tidied(Source("hf", str(path), flatten(_training_args(path)), complete=True))
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    content = _structured(path, text)
    if isinstance(content, Mapping):
        if "starts" in content or "precision_format" in content:
            yield from _our_manifest(path, content)
            return
        if "peft_type" in content:
            content = {"adapter": content}
        if "architectures" in content and "model_type" in content:
            content = _whole_model_config(path, content)
        values, words = flatten(content), False
    elif len(table := dict(_TABLE_LINE.findall(text))) > 10:
        yield Source(_system_of(path, table) or "megatron", str(path), table, complete=True)
        return
    else:
        script = read_script(text)
        values, words = dict(script.flags), True
        yield Source("environment", str(path), dict(script.variables), complete=True)
    system = _system_of(path, values, required=not in_folder)
    if system is None:
        return
    if system == "ours" or (system == "megatron" and "mm_model" in values):
        yield from _our_script(path, values, script.unknown if words else [])
        return
    yield _tidied(Source(system, str(path), values, words=words, unreadable=script.unknown if words else []))


def _tidied(source: Source) -> Source:
    """Give names that mean two things, and names whose absence means something, one meaning."""
    values = source.values
    if source.system == "hf" and (steps := values.get("warmup_steps")):
        number = float(steps[0] if isinstance(steps, list) else steps)
        if number < 1:  # a fraction under this name
            values["warmup_ratio"] = values.pop("warmup_steps")
    if source.system == "deepspeed":
        # DeepSpeed's own defaults, which hold whatever HF Trainer was given.
        values.setdefault("gradient_clipping", 0.0)
        values.setdefault("bf16.enabled", values.get("bfloat16.enabled", False))
        values.setdefault("fp16.enabled", False)
        if "optimizer.type" in values:
            for name, default in _DEEPSPEED_ADAM.items():
                values.setdefault(f"optimizer.params.{name}", default)
    return source


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names. Lists stay, and their elements are there by number too."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        name = f"{prefix}{str(name).removeprefix('--').replace('-', '_')}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
            if isinstance(value, list):
                flat |= {f"{name}.{i}": part for i, part in enumerate(value) if not isinstance(part, (Mapping, list))}
    return {_shortened(name): value for name, value in flat.items()}


def _shortened(name: str) -> str:
    for long, short in (("model.model_config.", "model_config."), ("moe_config.", "moe_config."), ("text_config.", "")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name


def _structured(path: Path, text: str) -> Any:
    """Return the content of a JSON, TOML or YAML file, None for other text."""
    try:
        if path.suffix == ".toml":
            return _toml(text)
        if path.suffix == ".json" or text.lstrip().startswith("{"):
            return json.loads(text)
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no YAML: {error}") from error
    return None


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise UserError("a .toml file can be read from Python 3.11 on; convert it to .json or .yaml") from error
    return tomllib.loads(text)


def _system_of(path: Path, values: Mapping[str, Any], required: bool = True) -> str | None:
    """Return the system most of whose names are there."""
    known = {system: sum(name in names_of(system) for name in values) for system in SYSTEMS if system != "environment"}
    # Our own names are few beside Megatron's, which are ours too.
    known["ours"] += known["megatron"] if "mm_model" in values or "mm_data" in values else 0
    best = max(known, key=lambda system: known[system])
    if known[best] >= 2:
        return best
    if required:
        raise UserError(f"{path}: has no settings of a known system; give {_READABLE}")
    return None


def _whole_model_config(path: Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in what a saved config leaves out: the defaults of its class, as Hugging Face itself reads the file."""
    from transformers import CONFIG_MAPPING

    if content["model_type"] not in CONFIG_MAPPING:
        return content
    return {**CONFIG_MAPPING[content["model_type"]].from_dict(dict(content)).to_dict(), "attn_implementation": None}


def _training_args(path: Path) -> dict[str, Any]:
    """Read what HF Trainer pickles, without running code that is not Hugging Face's or torch's."""
    import importlib

    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    wanted = get_unsafe_globals_in_checkpoint(path)
    classes: list[Any] = []
    for name in wanted:
        module, _, attribute = name.rpartition(".")
        if module.partition(".")[0] not in ("transformers", "accelerate", "torch", "datetime"):
            raise UserError(
                f"{path}: holds a {name}, which is not read since unpickling it could run code; "
                "write the arguments as JSON, Path('training_args.json').write_text(trainer.args.to_json_string())"
            )
        classes.append(getattr(importlib.import_module(module), attribute))
    with safe_globals(classes):
        args = torch.load(path, weights_only=True)
    if not hasattr(args, "__dict__"):
        raise UserError(f"{path}: holds no TrainingArguments but a {type(args).__name__}; pass the file Trainer saved")
    return {name: getattr(value, "value", value) for name, value in vars(args).items() if not name.startswith("__")}


def _our_manifest(path: Path, content: Mapping[str, Any]) -> Iterator[Source]:
    start = content["starts"][-1] if "starts" in content else content
    arguments, effective = dict(start.get("arguments", {})), start.get("effective", {})
    if settings := effective.get("settings"):
        ranks = {"world_size": start["world_size"]} if "world_size" in start else {}
        yield Source("effective", str(path), {**settings, **ranks})
    if variables := effective.get("environment"):
        yield Source("environment", str(path), variables, complete=True)
    config = effective.get("config") or {}
    if "model_type" in config:  # Hugging Face's, not model.json
        yield Source("config", str(path), flatten(config), complete=True)
    if trainer := start.get("training_arguments"):
        yield _tidied(Source("hf", str(path), flatten(trainer), complete=True))
    if not arguments:  # another trainer's record
        return
    configs = flatten({name: value for name, value in start.get("configs", {}).items() if name in _OUR_FILES.values()})
    yield Source("ours", str(path), {**_effective_flags(arguments), **configs}, complete=True)
    if "model_type" not in config:
        yield from _model_of(path, configs)


def _effective_flags(arguments: dict[str, Any]) -> dict[str, Any]:
    """Leave out the flags that nothing reads on the road that the run takes."""
    from mindspeed_mm.arguments import inert_flags

    inert = inert_flags("fsdp2" if arguments.get("use_torch_fsdp2") else "megatron")
    return {name: value for name, value in arguments.items() if name not in inert}


def _our_script(path: Path, flags: dict[str, Any], unknown: list[str]) -> Iterator[Source]:
    from mindspeed_mm.arguments.groups import FLAGS

    defaults = {flag.dest: flag.default for flag in FLAGS.values() if flag.dest not in unknown}
    spoken = {FLAGS[f"--{name.replace('_', '-')}"].dest if f"--{name.replace('_', '-')}" in FLAGS else name: value
              for name, value in flags.items()}  # fmt: skip
    values = _effective_flags({**defaults, **spoken})
    files: dict[str, Any] = {}
    for flag, name in _OUR_FILES.items():
        words = flags.get(flag, [])
        places = [folder / words[0] for folder in (path.parent, Path.cwd())] if words else []
        if file := next((place for place in places if place.is_file()), None):
            files |= flatten({name: _structured(file.with_suffix(".yaml"), file.read_text(encoding="utf-8"))})
    yield Source("ours", str(path), {**values, **files}, complete=True, words=True, unreadable=unknown)
    yield from _model_of(path, files)


def _model_of(path: Path, configs: Mapping[str, Any]) -> Iterator[Source]:
    folder = configs.get("model.init_from_hf_path")
    if folder and (file := Path(folder) / "config.json").is_file():
        yield from _read_file(file, in_folder=True)
