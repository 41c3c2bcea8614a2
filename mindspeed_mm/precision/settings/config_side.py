"""What one side is configured with: declared, default, derived and effective values by canonical key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.precision.settings.config_derive import READ_HERE, derive, is_on
from mindspeed_mm.precision.settings.config_keys import Key, Name, keys, names_of
from mindspeed_mm.precision.settings.config_sources import Source
from mindspeed_mm.precision.settings.config_values import equal, read_value, shown

# Of two that say something the earlier one counts: what ran, then what the trainer reads last.
_PRECEDENCE = ("effective", "ours", "megatron", "deepspeed", "torchtitan", "mindspore", "hf", "config", "environment")

_GROUPED = "group_query_attention"
_NOT_READ_WITH = {
    "warmup_steps": ("warmup_fraction", "warmup_samples"),
    "train_steps": ("train_samples",),
    "decay_steps": ("decay_samples",),
    "epochs": ("train_steps",),
}


@dataclass(frozen=True)
class Setting:
    """A value and where it is from: ``hf: adam_epsilon``, ``default of hf``, ``derived``, ``effective``."""

    value: Any
    origin: str

    def __str__(self) -> str:
        """Return it for people."""
        return f"{shown(self.value)} ({self.origin})"


@dataclass
class Side:
    """One side.

    Attributes:
        settings: by canonical key.
        unknown: names that no table has, by system: they are not compared.
        notes: contradictions, and values that cannot be known from the files.
    """

    settings: dict[str, Setting] = field(default_factory=dict)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """Return the value of a key, None if it is not known or "none"."""
        found = self.settings.get(key)
        return None if found is None else found.value


def understand(sources: Sequence[Source], given: Mapping[str, str] | None = None) -> Side:
    """Bring what the files of a side say under canonical keys.

    Args:
        sources: what they say.
        given: values by canonical key that count more than all files.

    Raises:
        UserError: a key of ``given`` is not known.
    """
    side = Side()
    table = keys()
    for name, text in (given or {}).items():
        if name not in table:
            raise UserError(
                f"{name}: no such setting.{did_you_mean(name, table)} The keys are in precision/settings/keys/*.yaml"
            )
        side.settings[name] = Setting(read_value(table[name], text), "given")
    ordered = sorted(sources, key=lambda source: _PRECEDENCE.index(source.system))
    for source in ordered:
        _declared(side, source)
    overridden = _drop_overridden(side)
    raw = {source.system: source.values for source in ordered}
    _derive(side, raw)
    for source in ordered:
        _defaults(side, source, overridden)
    _derive(side, raw)  # from the defaults, more follows
    _drop_overridden(side)
    _drop_unread(side)
    for source in ordered:
        if source.unreadable:
            side.notes.append(f"{source.place}: the values of {', '.join(source.unreadable)} come from outside of it")
    return side


def _derive(side: Side, raw: Mapping[str, Mapping[str, Any]]) -> None:
    for name, value, origin in list(derive(side.settings, raw)):
        side.settings[name] = Setting(value, origin)


def _drop_overridden(side: Side) -> set[str]:
    """Forget what is not read where another setting is given; return what that is."""
    dropped = {name for name, others in _NOT_READ_WITH.items() if any(side.value(other) for other in others)}
    for name in dropped:
        if not side.value(name) or name == "epochs":
            side.settings.pop(name, None)
    return dropped


def _drop_unread(side: Side) -> None:
    """Forget what nothing reads with these settings: adapters without targets, the momentum of an AdamW."""
    unread = set()
    if not side.value("lora_target_modules"):
        unread |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"}
    if side.value("optimizer") != "sgd":
        unread.add("sgd_momentum")
    if side.value("weight_decay_course") == "constant":
        unread |= {"weight_decay_first", "weight_decay_last"}
    for name in unread:
        side.settings.pop(name, None)


def _declared(side: Side, source: Source) -> None:
    known = _known_names(source.system)
    for name, raw in source.values.items():
        base, _, number = name.rpartition(".")
        if name not in known:
            part = number.isdigit() and base in source.values
            if not part and name not in READ_HERE and not _deliberately_left_out(source.system, name):
                names = side.unknown.setdefault(source.system, [])
                names += [name] if name not in names else []
            continue
        for key, spelled in known[name]:
            value = _value(key, spelled, raw, source.words)
            if _meaningless(key, source, raw):
                continue
            origin = f"{source.system}: {name}"
            if (before := side.settings.get(key.name)) is None or (before.value is None and source.complete):
                side.settings[key.name] = Setting(value, origin)
            elif value is not None and not equal(key, before.value, value) and before.origin != "effective":
                side.notes.append(f"{key.name} is {before}, but {shown(value)} by {origin} in {source.place}")


def _deliberately_left_out(system: str, name: str) -> bool:
    """Return whether a name that no table has is none that a user could miss there."""
    if system in ("environment", "effective"):
        return True
    return system == "ours" and (name.startswith(("model.", "data.", "fsdp2.")) or name in _our_flags())


@cache
def _our_flags() -> frozenset[str]:
    from mindspeed_mm.arguments.groups import FLAGS

    return frozenset(flag.dest for flag in FLAGS.values())


def _known_names(system: str) -> Mapping[str, list[tuple[Key, Name]]]:
    if system == "effective":
        return {key.name: [(key, Name(key.name))] for key in keys().values()}
    if system != "ours":
        return names_of(system)
    ours = names_of("ours")
    covered = {key.name for pairs in ours.values() for key, _ in pairs}
    megatron = {
        name: [(key, spelled) for key, spelled in pairs if key.name not in covered or name in ours]
        for name, pairs in names_of("megatron").items()
    }
    return {**{name: pairs for name, pairs in megatron.items() if pairs}, **ours}


def _meaningless(key: Key, source: Source, raw: Any) -> bool:
    """Return whether a value only looks like one: HF's "auto" in DeepSpeed files, flags that want another flag."""
    if raw == "auto":
        return True
    return key.name == "num_query_groups" and source.system == "megatron" and not is_on(source.values, _GROUPED)


def _value(key: Key, name: Name, raw: Any, words: bool) -> Any:
    if words and isinstance(raw, list):
        if not raw or (key.kind == "bool" and not isinstance(read_value(key, raw[0]), bool)):
            raw = True  # a bare flag, and what follows belongs to nobody
        elif key.kind not in ("list", "set"):
            raw = raw[0]
    elif isinstance(raw, list) and len(raw) == 1 and key.kind not in ("list", "set"):
        raw = raw[0]
    value = read_value(key, raw)
    return not value if name.inverted and (value is None or isinstance(value, bool)) else value


def _defaults(side: Side, source: Source, overridden: set[str]) -> None:
    for key in keys().values():
        names = key.names.get(source.system) or (key.names.get("megatron", ()) if source.system == "ours" else ())
        for name in names:
            if name.default is None or key.name in side.settings or key.name in overridden:
                continue
            if name.text and source.complete:
                continue
            value = read_value(key, name.default)
            origin = f"default of {source.system}" if name.text else f"what {source.system} does"
            side.settings[key.name] = Setting(not value if name.inverted else value, origin)
