"""Make what ``pretrain.sh --tiny`` of an example trains: a small model folder of its family, and digits to read.

Usage: ``python examples/tiny.py FAMILY FOLDER --configs CONFIGS``. Nothing is downloaded. It writes to FOLDER

    data/                    scikit-learn's handwritten digits with questions and answers, as the quickstart's
    model/                   a Hugging Face folder without weights: config, tokenizer, chat template, image processor
    data.json, model.json    copies of those in CONFIGS
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent / "quickstart"))
import prepare  # the quickstart's module

INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": prepare.PATCH_SIZE,
    "temporal_patch_size": 2,
}


def words_of(tokenizer: Any) -> int:
    """Return the size of the vocabulary, rounded up so that tensor parallelism can divide it."""
    return -(-len(tokenizer) // 64) * 64


def qwen_ids(tokenizer: Any) -> dict[str, int]:
    """Return the ids of Qwen's special tokens under the names of its configuration."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def rope(interleaved: bool) -> dict[str, Any]:
    """Return the rotary parameters for heads of 16, whose 8 frequencies time, height and width share."""
    sections = {"mrope_section": [4, 2, 2], **({"mrope_interleaved": True} if interleaved else {})}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **sections}}


def qwen2_5_vl(tokenizer: Any) -> Any:
    """Qwen2.5-VL: window attention in the tower, three axes of positions."""
    return transformers.Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={**TEXT, "vocab_size": words_of(tokenizer), **rope(interleaved=False)},
        vision_config={**VISION, "window_size": 2 * prepare.PATCH_SIZE * 2, "fullatt_block_indexes": [1]},
        **qwen_ids(tokenizer),
    )


def qwen3_vl_moe(tokenizer: Any) -> Any:
    """Qwen3-VL-MoE: experts, features of the tower's layers in those of the decoder."""
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return transformers.Qwen3VLMoeConfig(
        architectures=["Qwen3VLMoeForConditionalGeneration"],
        text_config={**TEXT, "head_dim": 16, "vocab_size": words_of(tokenizer), **rope(interleaved=True), **experts},
        vision_config={
            **VISION,
            "num_position_embeddings": (prepare.IMAGE_SIZE // prepare.PATCH_SIZE) ** 2,
            "deepstack_visual_indexes": [0],
        },
        **qwen_ids(tokenizer),
    )


def internvl(tokenizer: Any) -> Any:
    """InternVL3: a plain ViT, a projector, Qwen2."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sides = {"image_size": [prepare.IMAGE_SIZE] * 2, "patch_size": [prepare.PATCH_SIZE] * 2}
    return transformers.InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=words_of(tokenizer), tie_word_embeddings=False),
        vision_config={**tower, **sides},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(prepare.IMAGE_SIZE // prepare.PATCH_SIZE // 2) ** 2,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


FAMILIES: dict[str, Callable[[Any], Any]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "internvl": internvl,
}
PROCESSORS = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
    "internvl": "InternVLProcessor",
}


def tokenizer_of(family: str) -> Any:
    """Return the quickstart's tokenizer, for InternVL with that family's way of placing images."""
    tokenizer = prepare.build_tokenizer()
    if family != "internvl":
        return tokenizer
    template = prepare.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=INTERNVL_TOKENS,
        chat_template=template,
    )


def write_model_folder(family: str, folder: Path) -> None:
    """Write config, tokenizer, chat template and image processor; the weights will come from training."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(family)
    tokenizer.save_pretrained(folder)
    FAMILIES[family](tokenizer).save_pretrained(folder)
    side, processor = prepare.IMAGE_SIZE, {"processor_class": PROCESSORS[family]}
    if family == "internvl":
        transformers.GotOcr2ImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
        processor |= {"image_seq_length": (side // prepare.PATCH_SIZE // 2) ** 2}
    else:
        transformers.Qwen2VLImageProcessorPil(
            patch_size=prepare.PATCH_SIZE,
            temporal_patch_size=2,
            merge_size=2,
            size={"shortest_edge": side * side, "longest_edge": side * side},
        ).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--configs", type=Path, required=True, help="folder with data.json and model.json")
    options = parser.parse_args()
    rows, _ = prepare.write_data(options.folder / "data")
    write_model_folder(options.family, options.folder / "model")
    for name in ("data.json", "model.json"):
        shutil.copyfile(options.configs / name, options.folder / name)
    print(f"{rows} digits in {options.folder / 'data'}, a tiny {options.family} in {options.folder / 'model'}")


if __name__ == "__main__":
    main()
