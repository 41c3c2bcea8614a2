from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data.processors import load_processor
from mindspeed_mm.errors import UserError

FAMILIES = ["qwen3_vl", "qwen2_5_vl", "glm4v", "internvl"]


def outputs(processor):
    picture = Image.fromarray(np.arange(40 * 56 * 3, dtype=np.uint8).reshape(40, 56, 3))
    return processor(text=[f"a{processor.image_token}b"], images=[picture], return_tensors="pt")


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_is_the_same_after_it_was_saved_and_loaded(family, processor_folder, tmp_path):
    first = load_processor(processor_folder(family))
    first.save_pretrained(tmp_path)
    second = load_processor(tmp_path)
    assert (
        type(second).__name__
        == type(first).__name__
        == json.loads((tmp_path / "processor_config.json").read_text())["processor_class"]
    )
    assert equal(outputs(first), outputs(second))
    assert second.chat_template == first.chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_as_they_are_published_name_a_torchvision_image_processor(family, processor_folder, tmp_path):
    shutil.copytree(processor_folder(family), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    image = {**config.pop("image_processor"), "processor_class": config["processor_class"]}
    image["image_processor_type"] += "Fast"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    assert equal(outputs(load_processor(tmp_path)), outputs(load_processor(processor_folder(family))))


def test_a_text_model_has_a_tokenizer_only(processor_folder):
    assert load_processor(processor_folder("text"))("hello")["input_ids"]


def test_a_folder_without_the_needed_files_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model_name_or_path: no folder .*missing"):
        load_processor(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot load a processor from"):
        load_processor(tmp_path)
