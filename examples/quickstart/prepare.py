"""Make everything the quickstart trains on: pictures, conversations and a small model folder. Nothing is downloaded.

Usage: ``python examples/quickstart/prepare.py [--out runs/quickstart]``. It writes

    data/images/*.png        scikit-learn's handwritten digits, enlarged to IMAGE_SIZE x IMAGE_SIZE
    data/train.jsonl         one conversation per row, 80 % of the digits, chosen at random
    data/heldout.jsonl       the other 20 %, never seen in training
    model/                   a Hugging Face folder without weights: config, tokenizer, chat template, image processor
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLConfig

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit is written in the picture?"
IMAGE_SIZE = 32  # pixels
PATCH_SIZE = 8  # pixels; 2 x 2 patches are merged, so that a picture becomes (32 / 8 / 2) ** 2 = 4 tokens
TRAIN_SHARE = 0.8
SEED = 0

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_data(folder: Path) -> tuple[int, int]:
    """Write the pictures and the two JSONL files into ``folder`` and return how many rows each file has."""
    digits = load_digits()  # 1797 scans of 8 x 8 pixels, ink from 0 to 16
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (ink, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        picture = Image.fromarray(np.uint8(255 - ink / 16 * 255)).convert("RGB")
        name = f"images/{index:04d}.png"
        picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(folder / name)
        messages = [
            {"role": "user", "content": f"<image>{QUESTION}"},
            {"role": "assistant", "content": WORDS[digit]},
        ]
        rows.append({"images": [name], "messages": messages})
    random.Random(SEED).shuffle(rows)
    cut = round(TRAIN_SHARE * len(rows))
    for name, part in (("train", rows[:cut]), ("heldout", rows[cut:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return cut, len(rows) - cut


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the few sentences there are; any other text still encodes, as bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([QUESTION, "system user assistant", *WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """Return the architecture of Qwen3-VL at about two million parameters."""
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "num_position_embeddings": (IMAGE_SIZE // PATCH_SIZE) ** 2,
        "deepstack_visual_indexes": [1],
    }
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def write_model_folder(folder: Path) -> None:
    """Write config, tokenizer, chat template and image processor; the weights will come from training."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_config(tokenizer).save_pretrained(folder)
    pixels = IMAGE_SIZE * IMAGE_SIZE
    Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(folder)
    processor = {"processor_class": "Qwen3VLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    generation = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write data and model folder below ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder to write to")
    out = parser.parse_args().out
    trained, held_out = write_data(out / "data")
    write_model_folder(out / "model")
    print(f"{trained} training rows and {held_out} held-out rows in {out / 'data'}, model folder in {out / 'model'}")


if __name__ == "__main__":
    main()
