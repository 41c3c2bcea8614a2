"""Low-rank adapters (LoRA), put into a model by peft before it is sharded.

An adapted layer stays where it is in the module tree, so that paths in ``fsdp2_config.yaml``, ``_no_split_modules``
and components mean what they meant; the original layer becomes its ``base_layer``. Everything but the adapters is
frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from mindspeed_mm.distributed.meta import initialize
from mindspeed_mm.distributed.patterns import resolve, summarise
from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.extras import import_extra
from mindspeed_mm.models.transformers.families import Family

ALL_LINEAR = "all-linear"
_EVERYWHERE = "all"


@dataclass(frozen=True)
class LoraSettings:
    """The ``--lora-*`` flags.

    Attributes:
        target_modules: names, ends of paths or patterns of modules, whose linear layers get an adapter, or
            ``all-linear``.
        target_parameters: names or ends of names of parameters that get one, such as ``experts.down_proj``.
        apply_modules: parts of the model outside of which nothing gets one: components of model.json, paths or
            patterns; ``all`` for no limit.
        r: rank.
        alpha: an adapter's output is multiplied by ``alpha / r``.
        dropout: probability that an input element of an adapter is dropped.
    """

    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    apply_modules: tuple[str, ...] = (_EVERYWHERE,)
    r: int = 8
    alpha: int = 16
    dropout: float = 0.0


def add_adapters(
    model: nn.Module, settings: LoraSettings, family: Family | None = None, base: str | None = None
) -> list[str]:
    """Put adapters into ``model`` and freeze all else, in place. Parts that are frozen already get none.

    The adapters have no meaningful values until `initialize_adapters`.

    Args:
        model: a Hugging Face model or any other module, not yet sharded, possibly on the meta device.
        settings: what gets an adapter, and of which size.
        family: the names of the model's components, for ``apply_modules``.
        base: where the weights under the adapters can be read again; None if they cannot.

    Returns:
        Lines for the log.

    Raises:
        UserError: peft is missing, a name matches nothing, or nothing is left that may have an adapter.
    """
    peft = import_extra("peft", "lora", "--lora-target-modules")
    modules, parameters = _find_targets(model, settings, family)
    if parameters and settings.dropout:
        raise UserError(
            f"--lora-dropout {settings.dropout}: adapters of parameters cannot have dropout; leave it out, or leave "
            "--lora-target-parameters out."
        )
    # peft takes each for the end of a path, and others may end so too.
    ends = tuple(f".{path}" for path in modules)
    others = [path for path, _ in model.named_modules() if path.endswith(ends) and path not in modules]
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules,
        base_model_name_or_path=base,
        **({"target_parameters": parameters} if parameters else {}),
        **({"exclude_modules": others} if others else {}),
    )
    peft.inject_adapter_in_model(config, model)
    _check_found(model, {*modules, *(name.rpartition(".")[0] for name in parameters)})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    where = ", ".join(summarise([*modules, *parameters]))
    return [
        f"LoRA: rank {settings.r}, alpha {settings.alpha}, on {len(modules) + len(parameters)} layers: {where}",
        f"LoRA: {trained:,} of {total:,} parameters are trained",
    ]


def _check_found(model: nn.Module, wanted: set[str]) -> None:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = {name.partition(".lora_")[0].replace(".base_layer", "") for name in names}
    if found != wanted:
        raise UserError(
            f"--lora-target-modules: peft cannot tell {', '.join(summarise(sorted(found ^ wanted)))} from a target by "
            "the end of its path; choose other targets, or give the modules other names."
        )


def initialize_adapters(model: nn.Module, seed: int) -> None:
    """Set the adapters' first values: A as peft draws it, B zero, so that the model computes what it did before.

    They depend on ``seed`` and the path of the layer alone, not on the sharding or the number of ranks.

    Args:
        model: what `add_adapters` was given, by now sharded and with storage.
        seed: the same on all ranks.
    """
    layer_class = import_extra("peft.tuners.lora", "lora", "--lora-target-modules").LoraLayer

    def init(module: nn.Module) -> None:
        if isinstance(module, layer_class):
            for adapter in module.lora_A:
                module.reset_lora_parameters(adapter, True)

    initialize(model, init, seed, [name for name, p in model.named_parameters() if p.requires_grad])


def _find_targets(model: nn.Module, settings: LoraSettings, family: Family | None) -> tuple[list[str], list[str]]:
    """Return the paths of the linear layers and the names of the parameters that get adapters."""
    linear = {path: module.weight for path, module in model.named_modules() if _can_be_adapted(model, path, module)}
    named = dict(model.named_parameters(remove_duplicate=False))
    modules = _union(settings.target_modules, lambda word: _linear_layers(model, word, linear))
    parameters = _union(settings.target_parameters, lambda word: _parameters(word, named))
    found = {**{path: linear[path] for path in modules}, **{name: named[name] for name in parameters}}

    if not found:
        raise UserError(
            f"--lora-target-modules {ALL_LINEAR}: {type(model).__name__} has no linear layer; name other modules, or "
            "parameters in --lora-target-parameters."
        )
    allowed = _parts(model, settings.apply_modules, family)
    inside = {path: weight for path, weight in found.items() if allowed(path)}
    if not inside:
        raise UserError(
            f"--lora-apply-modules {' '.join(settings.apply_modules)}: none of the targets is in there, they are "
            f"{', '.join(summarise(found))}. Change it or the targets."
        )
    open_to_training = {path for path, weight in inside.items() if weight.requires_grad}
    if not open_to_training:
        raise UserError(
            f"--lora-target-modules: all that it matches is frozen, and what is frozen gets no adapter: "
            f"{', '.join(summarise(inside))}. Unfreeze in model.json what shall get adapters: under LoRA "
            "its own weights are not trained in any case."
        )
    uses: dict[int, list[str]] = {}
    for name, parameter in named.items():
        uses.setdefault(id(parameter), []).append(name)
    for path in open_to_training:
        if len(names := uses[id(found[path])]) > 1:
            raise UserError(
                f"--lora-target-modules: {path} shares its weight with others ({', '.join(names)}), and an adapter "
                "of one could not be merged. Leave it out."
            )
    return [p for p in modules if p in open_to_training], [p for p in parameters if p in open_to_training]


def _can_be_adapted(model: nn.Module, path: str, module: nn.Module) -> bool:
    # torch's own attention reads the weight of its output layer without calling the layer.
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(module, nn.Linear) and path != "" and not isinstance(parent, nn.MultiheadAttention)


def _linear_layers(model: nn.Module, word: str, linear: Iterable[str]) -> list[str]:
    if word == ALL_LINEAR:
        # As with peft, which leaves the output layer alone.
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return [path for path in linear if model.get_submodule(path) is not head]
    tops = _modules(model, word)
    found = [path for path in linear if any(_is_in(path, top) for top in tops)]
    if found:
        return found
    if tops:
        raise UserError(
            f"--lora-target-modules: '{word}' matches {', '.join(summarise(tops))} "
            f"({type(model.get_submodule(tops[0])).__name__}) and no linear layer is there; name linear layers."
        )
    fused = [name for name, _ in model.named_parameters() if name.endswith(f".{word}")]
    if fused:
        raise UserError(
            f"--lora-target-modules: '{word}' is no module but a parameter, {', '.join(summarise(fused))}; name it in "
            "--lora-target-parameters instead."
        )
    endings = dict.fromkeys(path.rpartition(".")[2] for path in linear)
    raise UserError(
        f"--lora-target-modules: '{word}' matches no module.{did_you_mean(word, [*endings, ALL_LINEAR])} "
        f"The linear layers are called {', '.join(endings)}; write one of these, a module path or {ALL_LINEAR}."
    )


def _parameters(word: str, named: Iterable[str]) -> list[str]:
    found = [name for name in named if f".{name}".endswith(f".{word}")]
    if not found:
        endings = dict.fromkeys(".".join(name.split(".")[-2:]) for name in named)
        raise UserError(
            f"--lora-target-parameters: '{word}' is the end of no parameter's name.{did_you_mean(word, endings)}"
        )
    return found


def _parts(model: nn.Module, words: Iterable[str], family: Family | None) -> Callable[[str], bool]:
    """Return the function that says whether a path lies in one of the parts that ``words`` name."""
    words = list(words)
    if _EVERYWHERE in words:
        return lambda path: True
    components = dict(family.components) if family else {}
    tops: list[str] = []
    for word in words:
        if word not in components:
            tops += (found := _modules(model, word))
            if not found:
                names = [*components, *(path for path, _ in model.named_modules() if path and path.count(".") < 2)]
                raise UserError(
                    f"--lora-apply-modules: '{word}' is no part of {type(model).__name__}.{did_you_mean(word, names)} "
                    f"Use {_EVERYWHERE} or some of {', '.join(names)}."
                )

    def allowed(path: str) -> bool:
        component = family.component_of(path) if family else None
        return component in words or any(_is_in(path, top) for top in tops)

    return allowed


def _modules(model: nn.Module, word: str) -> list[str]:
    """Return the paths of the modules that a name, the end of a path or a pattern with braces stands for."""
    if "{" in word:
        try:
            return [path for path, _ in resolve(model, word)]
        except UserError as error:
            raise UserError(f"--lora-target-modules: {error}") from None
    return [path for path, _ in model.named_modules() if f".{path}".endswith(f".{word}")]


def _is_in(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}.")


def _union(words: Iterable[str], find: Callable[[str], list[str]]) -> list[str]:
    return list(dict.fromkeys(path for word in words for path in find(word)))
