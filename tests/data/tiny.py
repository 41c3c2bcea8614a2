"""Tiny processors of real families, and small data sets of real pictures, made offline in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_CORPUS = ["What digit is this? The answer is seven.", "Describe the picture. A red flower in front of a wall."]

# Each template marks what an assistant wrote with {% generation %}, so that the labels can be compared with the mask
# that transformers derives from the marks.
_CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
{% if m.role == 'assistant' %}{% generation %}CONTENT{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}\
{% else %}CONTENT{{ '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
_GLM = """[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}\
{% if m.role == 'assistant' %}{% generation %}CONTENT{% endgeneration %}{% else %}CONTENT{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
_CONTENT = """{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
{% if part.type == 'image' %}{{ 'IMAGE' }}{% elif part.type == 'audio' %}{{ 'SOUND' }}\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"""

_QWEN = {
    "chat_template": _CHATML,
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "special": ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "eos": "<|im_end|>",
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "text": {**_QWEN, "image": ""},
    "qwen3_vl": {**_QWEN, "processor": "Qwen3VLProcessor"},
    "qwen2_5_vl": {**_QWEN, "processor": "Qwen2_5_VLProcessor"},
    "glm4v": {
        "processor": "Glm4vProcessor",
        "chat_template": _GLM,
        "image": "<|begin_of_image|><|image|><|end_of_image|>",
        "special": [
            *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>"),
            *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
        ],
        "eos": "<|endoftext|>",
    },
    "qwen2_audio": {
        "processor": "Qwen2AudioProcessor",
        "chat_template": _CHATML,
        "image": "",
        "audio": "Audio: <|audio_bos|><|AUDIO|><|audio_eos|>\\n",
        "special": ["<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"],
        "eos": "<|im_end|>",
    },
    "internvl": {
        "processor": "InternVLProcessor",
        "chat_template": _CHATML,
        "image": "<IMG_CONTEXT>\\n",  # as the published template: the image brings its own line break
        "special": ["<|im_start|>", "<|im_end|>"],
        "eos": "<|im_end|>",
    },
}


def save_tiny_processor(family: str, folder: str | Path, vocab_size: int = 300, chat_template: str = "") -> Any:
    """Write a working processor of ``family`` into ``folder`` and return it (a tokenizer for ``"text"``).

    Token ids are whatever the tokenizer gave out: a model configuration must read them from here
    (``processor.tokenizer.convert_tokens_to_ids(...)``, ``len(tokenizer)``). Patches are 4x4 pixels, 2x2 of which are
    merged into one token; InternVL sees 16x16 pixels as 4 tokens; Qwen2-Audio hears one second.

    Args:
        family: ``text``, ``qwen3_vl``, ``qwen2_5_vl``, ``glm4v``, ``internvl`` or ``qwen2_audio``.
        folder: created if it does not exist.
        vocab_size: of the byte-pair encoding, special tokens come on top.
        chat_template: replaces the family's own.
    """
    import transformers

    from mindspeed_mm.data.processors import _without_video

    spec = _FAMILIES[family]
    marks = {"CONTENT": _CONTENT, "IMAGE": spec["image"], "SOUND": spec.get("audio", "")}
    template = spec["chat_template"]
    for name, mark in marks.items():
        template = template.replace(name, mark)
    template = chat_template or template
    tokenizer = _tokenizer(spec, vocab_size, internvl=family == "internvl")
    folder = Path(folder)
    if "processor" not in spec:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return tokenizer
    if family == "qwen2_audio":
        hears = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)  # one second, a token for 40 ms
        processor = transformers.Qwen2AudioProcessor(hears, tokenizer, chat_template=template)
        processor.save_pretrained(folder)
        return processor
    options: dict[str, Any] = {}
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    if family == "internvl":
        image_processor = transformers.GotOcr2ImageProcessorPil(size={"height": 16, "width": 16})
        options["image_seq_length"] = 4
    elif family == "glm4v":
        size = {"shortest_edge": 2 * 8 * 8, "longest_edge": 2 * 64 * 64}
        image_processor = transformers.Glm4vImageProcessorPil(size=size, **patches)
    else:
        image_processor = transformers.Qwen2VLImageProcessorPil(min_pixels=8 * 8, max_pixels=64 * 64, **patches)
    processor_class = _without_video(getattr(transformers, spec["processor"]))
    processor = processor_class(image_processor=image_processor, tokenizer=tokenizer, chat_template=template, **options)
    processor.save_pretrained(folder)
    return processor


def _tokenizer(spec: dict[str, Any], vocab_size: int, internvl: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(_CORPUS * 2, trainer)
    bpe.add_special_tokens(spec["special"])
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=spec["eos"],
        pad_token="<|endoftext|>",
        **({"extra_special_tokens": named} if internvl else {}),
    )


def save_digits(folder: str | Path, count: int = 8, scale: int = 4) -> list[dict[str, Any]]:
    """Write the first ``count`` handwritten digits of scikit-learn as PNG files and return their sharegpt rows."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        pixels = np.kron(digits.images[index] * 255 / 16, np.ones((scale, scale))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        rows.append(
            {
                "images": [f"images/{index}.png"],
                "messages": [
                    {"role": "user", "content": "<image>\nWhat digit is this?"},
                    {"role": "assistant", "content": f"The answer is {digits.target[index]}."},
                ],
            }
        )
    return rows


def write_jsonl(path: str | Path, rows: list[Any]) -> Path:
    """Write one JSON value per line."""
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
