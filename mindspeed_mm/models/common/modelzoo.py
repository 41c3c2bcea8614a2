"""The model hub: from the ``model_id`` of model.json, or the Hugging Face config, to a model class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.models.common.lookup import lookup

C = TypeVar("C", bound=type)


class ModelHub:
    """Which class to build for a model.

    Register a class of your own in either way, for example from a file given with ``--plugin``::

        ModelHub.MODEL_MAPPINGS["my_model"] = MyModel

        @ModelHub.register("my_model")
        class MyModel(SomeHuggingFaceModel, FSDP2Mixin, WeightInitMixin): ...

    Attributes:
        MODEL_MAPPINGS: ``model_id`` (an HF ``model_type`` or architecture name works too) to a class, or to the
            name of a class in ``transformers``, which is imported when it is needed.
    """

    MODEL_MAPPINGS: ClassVar[dict[str, type | str]] = {
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
        "internvl": "InternVLForConditionalGeneration",
        "glm4v": "Glm4vForConditionalGeneration",
        "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    }

    @classmethod
    def register(cls, model_id: str) -> Callable[[C], C]:
        """Return a class decorator that adds the class under ``model_id``; the last one registered counts."""

        def add(model_cls: C) -> C:
            cls.MODEL_MAPPINGS[model_id] = model_cls
            return model_cls

        return add

    @classmethod
    def build(cls, config: Any, transformer_config: Any) -> type:
        """Return the class for a model; nothing is instantiated.

        The first that exists: the class registered under ``config.model_id``; the architecture named in the HF
        config; the class registered under its ``model_type``; what HF's Auto classes choose for it (image-text
        to text before causal language model), the model folder's own code under ``--trust-remote-code`` included.

        Args:
            config: model.json; ``model_id``, ``init_from_hf_path`` and ``trust_remote_code`` are read.
            transformer_config: the HF config.

        Raises:
            UserError: nothing was found, or the class belongs to another ``model_type`` than the config.
        """
        model_id = lookup(config, "model_id")
        if model_id in cls.MODEL_MAPPINGS:
            model_cls = _resolve(cls.MODEL_MAPPINGS[model_id])
            _check_model_type(model_id, model_cls, transformer_config)
            return model_cls
        architectures = getattr(transformer_config, "architectures", None) or []
        for name in [*architectures, transformer_config.model_type]:
            found = _resolve(cls.MODEL_MAPPINGS.get(name, name))
            if found is not None:
                return found
        if (found := _from_auto_classes(config, transformer_config)) is not None:
            return found
        named = f"model_id '{model_id}' is not registered" if model_id else "model_id is not given"
        raise UserError(
            f"model.json: {named}.{did_you_mean(str(model_id), cls.MODEL_MAPPINGS)} The HF config names no class "
            f"either: architectures {list(architectures)}, model_type '{transformer_config.model_type}'. "
            f"Known ids: {', '.join(sorted(cls.MODEL_MAPPINGS))}. Register a class of your own with "
            f"--plugin <file.py>, or give --trust-remote-code if the model folder brings its code."
        )


def _resolve(entry: type | str) -> Any:
    """Return the class itself, the class of this name in transformers, or None."""
    if not isinstance(entry, str):
        return entry
    import transformers

    found = getattr(transformers, entry, None)
    return found if isinstance(found, type) else None


def _check_model_type(model_id: str, model_cls: type, transformer_config: Any) -> None:
    expected = getattr(getattr(model_cls, "config_class", None), "model_type", "")
    found = transformer_config.model_type
    if expected and found and expected != found:
        raise UserError(
            f"model.json: model_id '{model_id}' is {model_cls.__name__} (model_type '{expected}'), but "
            f"init_from_hf_path holds a config of model_type '{found}'. Remove model_id, or point "
            f"init_from_hf_path at a '{expected}' model (InternVL: the '-HF' edition of the weights)."
        )


def _from_auto_classes(config: Any, transformer_config: Any) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto import modeling_auto

    if lookup(config, "trust_remote_code", False):
        code = getattr(transformer_config, "auto_map", None) or {}
        for name in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel"):
            if name in code:
                return get_class_from_dynamic_module(code[name], lookup(config, "init_from_hf_path"))
    for mapping in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    ):
        if (found := mapping.get(type(transformer_config), None)) is not None:
            return found[0] if isinstance(found, tuple) else found
    return None
