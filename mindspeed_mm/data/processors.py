"""Load a model's own Hugging Face processor, also where torchvision is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspeed_mm.data.video_processors import load_video_processor
from mindspeed_mm.errors import UserError

# Where a folder may name its processor class, the most specific file first.
_NAMING_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the processor of a Hugging Face folder, or its tokenizer if the model has no other input than text.

    Video processors need torchvision, and a processor class cannot be built without its video processor. Where
    torchvision is missing the same class is therefore loaded with its image processor and tokenizer only. It is given
    its video processor afterwards, with torch in torchvision's place, where `load_video_processor` knows how.

    Args:
        folder: a local folder with the tokenizer and processor files of the model. Nothing is downloaded.
        trust_remote_code: run processor code that the folder brings along.

    Raises:
        UserError: the folder does not exist or has no usable processor or tokenizer.
    """
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils import is_torchvision_available

    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"preprocess_parameters.model_name_or_path: no folder {str(folder)!r}; "
            "set it to the local Hugging Face folder of the model (config.json, tokenizer and processor files)"
        )
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        name = _processor_class_name(path)
        if name is None:
            return AutoTokenizer.from_pretrained(path, **options)
        if is_torchvision_available():
            return AutoProcessor.from_pretrained(path, **options)
        found = _find_class(name, path)
        processor = _without_video(found).from_pretrained(path, **options)
        if found is not type(processor) and (video_processor := load_video_processor(found, path)) is not None:
            processor.video_processor = video_processor
        return processor
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"preprocess_parameters.model_name_or_path: cannot load a processor from {str(folder)!r}: {reason}; "
            "copy the tokenizer and preprocessor files of the original model into that folder"
        ) from error


def _processor_class_name(folder: Path) -> str | None:
    """Return the processor class that the folder asks for, None for a model that only needs its tokenizer."""
    for file in _NAMING_FILES:
        if (folder / file).is_file():
            name = json.loads((folder / file).read_text(encoding="utf-8")).get("processor_class")
            if name:
                return str(name)
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    config = folder / "config.json"
    if not config.is_file():
        return None
    return PROCESSOR_MAPPING_NAMES.get(json.loads(config.read_text(encoding="utf-8")).get("model_type"))


def _find_class(name: str, folder: Path) -> type:
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"transformers {transformers.__version__} has no processor class {name!r}")
    return found


def _without_video(processor_class: Any) -> Any:
    """Return ``processor_class`` without its video processor.

    transformers asks the class which parts to load and to expect in its constructor, so answering "image
    processor and tokenizer" is all there is to do.
    """
    if "video_processor" not in processor_class.get_attributes():
        return processor_class

    class ProcessorWithoutVideo(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if name != "video_processor"]

    # Saved files carry the class name and must keep naming the original.
    ProcessorWithoutVideo.__name__ = processor_class.__name__
    return ProcessorWithoutVideo
