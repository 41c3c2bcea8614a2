from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.configs.base import load_config
from mindspeed_mm.configs.config import DEFAULT_TOOLS
from mindspeed_mm.configs.data import DataConfig
from mindspeed_mm.configs.fsdp2 import Fsdp2Config, load_fsdp2_config
from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.configs.tools import ToolsConfig
from mindspeed_mm.errors import UserError

HUGGINGFACE: dict[str, Any] = {
    "dataset_param": {
        "dataset_type": "huggingface",
        "preprocess_parameters": {
            "model_name_or_path": "./ckpt/hf_path/Qwen3-VL-8B-Instruct",
            "use_fast_tokenizer": True,
            "split_special_tokens": False,
            "image_max_pixels": 262144,
            "image_min_pixels": 0,
            "video_max_pixels": 16384,
            "video_min_pixels": 0,
            "video_fps": 2,
            "video_maxlen": 64,
        },
        "basic_parameters": {
            "template": "qwen3_vl",
            "dataset_dir": "./data",
            "dataset": "./data/a.json,./data/b.jsonl",
            "cache_dir": "./data/cache_dir",
            "train_on_prompt": False,
            "mask_history": False,
            "preprocessing_batch_size": 1000,
            "preprocessing_num_workers": 16,
            "max_samples": None,
            "tool_format": None,
        },
        "attr": {
            "system": None,
            "images": "images",
            "videos": None,
            "messages": "messages",
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": None,
            "function_tag": None,
            "system_tag": None,
        },
    },
    "dataloader_param": {
        "dataloader_mode": "sampler",
        "drop_last": True,
        "sampler_type": "BaseRandomBatchSampler",
        "collate_param": {"model_name": "qwen3vl", "ignore_pad_token_for_loss": True},
        "pin_memory": True,
        "shuffle": True,
    },
}

MULTIMODAL: dict[str, Any] = {
    "dataset_param": {
        "dataset_type": "multimodal",
        "basic_parameters": {"data_path": "/data/rows.jsonl", "data_folder": "/data", "repeat_time": 1},
        "preprocess_parameters": {
            "image_reader_type": "torchvision",
            "train_pipeline": {
                "image": [
                    {"trans_type": "Resize", "param": {"size": [448, 448], "interpolation": "BICUBIC"}},
                    {"trans_type": "ToTensor"},
                ]
            },
        },
        "tokenizer_config": {
            "hub_backend": "hf",
            "autotokenizer_name": "AutoTokenizer",
            "from_pretrained": "OpenGVLab/InternVL3-8B",
            "add_eos_token": False,
            "use_fast": False,
        },
        "use_text_processer": True,
        "template_name": "internvl2_5",
        "patch_size": 14,
        "image_size": 448,
        "down_sample_ratio": 0.5,
        "group_by_length": True,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "min_num_frame": 8,
        "max_num_frame": 32,
        "sampling_method": "rand",
    },
    "dataloader_param": {"dataloader_mode": "sampler", "collate_param": {"model_name": "internvl", "pad_id": 2}},
}

# What pretrain_transformers.py reads: the Hugging Face folder has the shapes.
TRANSFORMERS_MODEL: dict[str, Any] = {
    "model_id": "qwen3_vl",
    "init_from_hf_path": "./ckpt/hf_path/Qwen3-VL-8B-Instruct",
    "image_encoder": {
        "vision_encoder": {
            "model_id": "qwen3vit",
            "num_layers": 27,
            "hidden_size": 1152,
            "num_attention_heads": 16,
            "freeze": True,
            "attn_implementation": "flash_attention_2",
            "attn_layout": "TND",
            "synchronize_per_layer": False,
        },
        "vision_projector": {"model_id": "lnmlp", "num_layers": 1, "freeze": True},
    },
    "text_decoder": {
        "model_id": "qwen3_lm",
        "num_layers": 999,
        "hidden_size": 999,
        "num_attention_heads": 999,
        "max_position_embeddings": 9999999,
        "freeze": False,
        "use_npu_fused_moe": False,
        "is_causal": True,
        "activation_offload": False,
    },
    "loss_cfg": {"compute_mode": "default", "chunk_size": 1024, "router_aux_loss_coef": 0.0},
    "img_context_token_id": 151671,
    "patch": {"clip_grad_async": True, "scale_grad": True},
}

# What pretrain_vlm.py reads: the shapes are here.
VLM_MODEL: dict[str, Any] = {
    "model_id": "qwen2_5vl",
    "pre_process": True,
    "post_process": True,
    "img_context_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "image_encoder": {
        "tp": 1,
        "vision_encoder": {
            "model_id": "qwen2vit",
            "pipeline_num_layers": [[6, 7], [8, 11]],
            "ffn_hidden_size": 3456,
            "layernorm_epsilon": 1e-06,
            "window_attn_size": 112,
            "fullatt_block_indexes": [7, 15],
            "deepstack_visual_indexes": [8, 16],
            "params_dtype": "bf16",
            "bf16": True,
            "select_layer": -1,
            "ps_version": "v2",
            "drop_path_rate": 0.4,
        },
        "vision_projector": {"model_id": "InternVLMLP", "input_size": 1280, "vit_hidden_size": 1024},
    },
    "audio_encoder": {"audio_encoder": {"model_id": "qwen_omni", "freeze": True}},
    "text_decoder": {
        "model_id": "qwen2_5_lm",
        "pipeline_num_layers": [6, 11, 11, 8],
        "num_query_groups": 8,
        "position_embedding_type": "mrope",
        "mrope_section": [16, 24, 24],
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000,
        "num_moe_experts": 128,
        "moe_router_topk": 8,
        "n_shared_experts": 2,
    },
    "text_encoder": None,
    "video_encoder": None,
}

SORA_MODEL: dict[str, Any] = {
    "task": "t2v",
    "load_video_features": True,
    "load_text_features": True,
    "ae": {"model_id": "a", "block_out_channels": [128, 256], "dtype": "bf16"},
    "text_encoder": [{"model_id": "llm", "dtype": "bf16"}, {"model_id": "clip"}],
    "diffusion": {"model_id": "d", "shift": 7.0},
    "predictor": {"model_id": "dit", "from_pretrained": None, "patch_size": [1, 2, 2]},
    "patch": {"ae_float32": True},
}


def load(cls: Any, folder: Path, document: Any) -> Any:
    path = folder / "document.json"
    path.write_text(json.dumps(document))
    return load_config(cls, path)


def problem(cls: Any, folder: Path, document: Any) -> str:
    with pytest.raises(UserError) as error:
        load(cls, folder, document)
    return str(error.value).removeprefix(f"{folder / 'document.json'}: ")


class TestData:
    def test_huggingface(self, tmp_path: Path) -> None:
        cfg = load(DataConfig, tmp_path, HUGGINGFACE)
        assert cfg.dataset_param.dataset_type == "huggingface"
        assert cfg.dataset_param.basic_parameters.dataset == "./data/a.json,./data/b.jsonl"
        assert cfg.dataset_param.basic_parameters.get("val_rate", 0.0) == 0.0
        assert cfg.dataset_param.preprocess_parameters.video_fps == 2.0
        assert cfg.dataset_param.attr.observation_tag is None
        assert cfg.dataloader_param.collate_param.pad_to_multiple_of == 8

    def test_documented_defaults(self, tmp_path: Path) -> None:
        minimal = {"dataset_type": "huggingface", "basic_parameters": {}, "preprocess_parameters": {}}
        dataset = load(DataConfig, tmp_path, {"dataset_param": minimal}).dataset_param
        assert dataset.basic_parameters.dataset_dir == "data" and dataset.basic_parameters.enable_thinking
        assert dataset.basic_parameters.preprocessing_batch_size == 1000
        assert dataset.preprocess_parameters.image_max_pixels == 768 * 768
        assert dataset.preprocess_parameters.video_maxlen == 128
        assert (dataset.attr.messages, dataset.attr.role_tag, dataset.attr.assistant_tag) == (
            "conversations",
            "from",
            "gpt",
        )

    def test_multimodal_sources_are_a_list_once_loaded(self, tmp_path: Path) -> None:
        one = load(DataConfig, tmp_path, MULTIMODAL).dataset_param
        assert [source.repeat_time for source in one.basic_parameters] == [1.0]
        assert one.preprocess_parameters.train_pipeline.image[0].param.size == [448, 448]
        several = copy.deepcopy(MULTIMODAL)
        several["dataset_param"]["basic_parameters"] = [{"data_path": "a.json"}, {"data_path": "b", "repeat_time": 0.5}]
        assert len(load(DataConfig, tmp_path, several).dataset_param.basic_parameters) == 2
        several["dataset_param"]["basic_parameters"] = []
        assert "at least 1 item" in problem(DataConfig, tmp_path, several)

    def test_unsupported_dataset_type_lists_the_supported_ones(self, tmp_path: Path) -> None:
        assert problem(DataConfig, tmp_path, {"dataset_param": {"dataset_type": "t2v"}}) == (
            "dataset_param.dataset_type: must be one of 'huggingface', 'multimodal' in this version; found \"t2v\"."
        )
        assert problem(DataConfig, tmp_path, {"dataset_param": {}}) == "dataset_param.dataset_type: is required."

    @pytest.mark.parametrize(
        ("section", "key", "value", "expected"),
        [
            ("attr", "imges", "images", "unknown key. Did you mean 'images'?"),
            ("basic_parameters", "val_rat", 0.1, "unknown key. Did you mean 'val_rate'?"),
            ("basic_parameters", "val_rate", 1.5, "must be less than or equal to 1; found 1.5."),
            ("basic_parameters", "data_path", "x", "unknown key. Did you mean"),
            ("preprocess_parameters", "video_fps", 0, "must be greater than 0; found 0."),
        ],
    )
    def test_a_wrong_key_is_named_with_its_full_path(
        self, tmp_path: Path, section: str, key: str, value: Any, expected: str
    ) -> None:
        document = copy.deepcopy(HUGGINGFACE)
        document["dataset_param"][section][key] = value
        assert problem(DataConfig, tmp_path, document).startswith(f"dataset_param.{section}.{key}: {expected}")

    def test_cutoff_len_points_to_the_flag(self, tmp_path: Path) -> None:
        document = copy.deepcopy(HUGGINGFACE)
        document["dataset_param"]["basic_parameters"]["cutoff_len"] = 1024
        message = problem(DataConfig, tmp_path, document)
        assert "`cutoff_len` is deprecated, please use `seq_length`" in message and "--seq-length" in message

    def test_a_dataset_of_ones_own(self, tmp_path: Path) -> None:
        cfg = load(DataConfig, tmp_path, {"custom": {"clips": "x.csv"}, "dataloader_param": {"shuffle": False}})
        assert cfg.custom.clips == "x.csv" and cfg.dataset_param is None
        assert "Keys of your own go under 'custom'." in problem(DataConfig, tmp_path, {"custom": {}, "clips": "x.csv"})
        assert "'dataset_param' is required" in problem(DataConfig, tmp_path, {"dataloader_param": {}})

    def test_data_files_beside_the_config_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "rows.json").write_text("[]")
        (tmp_path / "other.json").write_text("[]")
        monkeypatch.chdir(tmp_path)
        document = copy.deepcopy(HUGGINGFACE)
        document["dataset_param"]["basic_parameters"]["dataset"] = "rows.json,other.json"
        cfg = load(DataConfig, tmp_path / "configs", document)
        assert cfg.dataset_param.basic_parameters.dataset == f"{tmp_path}/configs/rows.json,other.json"

    def test_worker_processes_can_have_it(self, tmp_path: Path) -> None:
        for document in (HUGGINGFACE, MULTIMODAL):
            cfg = load(DataConfig, tmp_path, document)
            assert pickle.loads(pickle.dumps(cfg)) == cfg == copy.deepcopy(cfg)


class TestModel:
    @pytest.mark.parametrize("document", [TRANSFORMERS_MODEL, VLM_MODEL, SORA_MODEL])
    def test_published_kinds_of_files_load(self, tmp_path: Path, document: dict[str, Any]) -> None:
        cfg = load(ModelConfig, tmp_path, document)
        assert pickle.loads(pickle.dumps(cfg)) == cfg == copy.deepcopy(cfg)

    def test_values(self, tmp_path: Path) -> None:
        cfg = load(ModelConfig, tmp_path, TRANSFORMERS_MODEL)
        assert cfg.image_encoder.vision_encoder.freeze is True and cfg.text_decoder.freeze is False
        assert cfg.loss_cfg.loss_type == "default" and "loss_type" not in cfg.loss_cfg
        sora = load(ModelConfig, tmp_path, SORA_MODEL)
        assert sora.predictor.patch_size == [1, 2, 2] and sora.text_encoder[1].model_id == "clip"
        assert sora.predictor.to_dict() == SORA_MODEL["predictor"]
        assert load(ModelConfig, tmp_path, VLM_MODEL).text_decoder.rope_scaling.factor == 2.0

    def test_subtrees_may_be_taken_away(self, tmp_path: Path) -> None:
        cfg = load(ModelConfig, tmp_path, VLM_MODEL)
        cfg.image_encoder = None
        cfg.pre_process = False
        assert cfg.image_encoder is None

    @pytest.mark.parametrize("key", ["custom", "predictor", "ae", "diffusion", "text_encoder", "video_encoder"])
    def test_anything_goes_under_the_free_keys(self, tmp_path: Path, key: str) -> None:
        cfg = load(ModelConfig, tmp_path, {key: {"any": {"thing": [1, {"x": None}]}}})
        assert getattr(cfg, key).any.thing[1].x is None

    def test_wrong_keys(self, tmp_path: Path) -> None:
        document = copy.deepcopy(TRANSFORMERS_MODEL)
        document["text_decoder"]["frezee"] = True
        document["depth"] = 3
        first, second = problem(ModelConfig, tmp_path, document).splitlines()
        assert first == "text_decoder.frezee: unknown key. Did you mean 'freeze'?"
        assert "depth: unknown key." in second and "under 'custom'" in second


class TestFsdp2:
    DOCUMENTED = (
        "sharding_size: auto\t\n"
        "sub_modules_to_wrap:\t\n"
        '  - "text_decoder.output_layer"\t\n'
        '  - "text_decoder.embedding"\t\n'
        '  - "text_decoder.rotary_pos_emb"\t\n'
        '  - "text_decoder.decoder.layers.{*}"\t\n'
        'param_dtype: "bf16"\t\n'
        'reduce_dtype: "fp32"\t\n'
        "cast_forward_inputs: True\t\n"
        "ignored_modules:\t\n"
        '  - "image_encoder"\t\n'
        "recompute_modules:\t\n"
        '  - "text_decoder.decoder.layers.{*}"\t\n'
        "num_to_forward_prefetch: 2\t\n"
        "num_to_backward_prefetch: 2\n"
        "offload_to_cpu: False\n"
    )
    """The example of both migration guides, with the tabs it was published with."""

    @pytest.mark.parametrize(
        "text", [DOCUMENTED, DOCUMENTED.replace("  - ", "- "), "    " + DOCUMENTED.replace("\n", "\n    ")]
    )
    def test_the_documented_example_loads(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "fsdp2_config.yaml"
        path.write_text(text)
        assert load_fsdp2_config(path) == Fsdp2Config(
            sharding_size="auto",
            sub_modules_to_wrap=[
                "text_decoder.output_layer",
                "text_decoder.embedding",
                "text_decoder.rotary_pos_emb",
                "text_decoder.decoder.layers.{*}",
            ],
            param_dtype="bf16",
            reduce_dtype="fp32",
            cast_forward_inputs=True,
            ignored_modules=["image_encoder"],
            recompute_modules=["text_decoder.decoder.layers.{*}"],
            num_to_forward_prefetch=2,
            num_to_backward_prefetch=2,
            offload_to_cpu=False,
        )

    def test_no_file_means_defaults(self) -> None:
        cfg = load_fsdp2_config(None)
        assert cfg == load_fsdp2_config("") == Fsdp2Config()
        assert cfg.sharding_size is None and cfg.reshard_after_forward is True and cfg.use_reentrant is True

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("sharding_size: 0", "sharding_size: must be greater than or equal to 1 or must be 'auto'; found 0."),
            ("param_dtype: bfloat16", "param_dtype: must be 'bf16', 'fp16' or 'fp32'; found \"bfloat16\"."),
            ("sub_modules_to_wrap: model.layers.{*}", "sub_modules_to_wrap: must be a list; found"),
            ("sub_module_to_wrap: []", "sub_module_to_wrap: unknown key. Did you mean 'sub_modules_to_wrap'?"),
            ("reshard_after_forward: sometimes", "reshard_after_forward: must be true or false or must be a whole"),
            ("cast_forward_inputs: 1", "cast_forward_inputs: must be true or false; found 1."),
            ("expert_parallel_size: 2", "expert_parallel_size: must be 1; found 2."),
        ],
    )
    def test_wrong_values(self, tmp_path: Path, line: str, expected: str) -> None:
        path = tmp_path / "fsdp2.yaml"
        path.write_text(line)
        with pytest.raises(UserError) as error:
            load_fsdp2_config(path)
        assert str(error.value).startswith(f"{path}: {expected}")

    @pytest.mark.parametrize("value", [True, False, 4])
    def test_reshard_after_forward_keeps_bool_and_int_apart(self, value: bool | int) -> None:
        assert Fsdp2Config(reshard_after_forward=value).reshard_after_forward is value


class TestTools:
    def test_the_packaged_file_holds_the_defaults(self) -> None:
        packaged = load_config(ToolsConfig, DEFAULT_TOOLS)
        assert packaged.profile == ToolsConfig().profile
        assert packaged.memory_profile == ToolsConfig().memory_profile
        assert packaged.sorafeature.save_path == "./sora_features"

    def test_a_part_is_enough(self, tmp_path: Path) -> None:
        cfg = load(ToolsConfig, tmp_path, {"profile": {"enable": True, "ranks": [-1]}})
        assert cfg.profile.static_param.start_step == 10 and not cfg.memory_profile.enable

    def test_wrong_values(self, tmp_path: Path) -> None:
        message = problem(ToolsConfig, tmp_path, {"profile": {"profile_type": "statc", "ranks": [-2]}, "memory": {}})
        assert "profile.profile_type: must be 'static' or 'dynamic'; found \"statc\". Did you mean 'static'?" in message
        assert "profile.ranks[0]: must be greater than or equal to -1; found -2." in message
        assert "memory: unknown key. Did you mean 'memory_profile'?" in message
