"""One training run as five other systems configure it, by hand, with their own names, units, spellings and defaults.

``FILES`` is the run of ``reference()``; ``CHANGES`` lists, for each system, texts to replace so that one setting
becomes another, and the canonical keys that then differ (what follows from a setting included).
"""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 5504,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}

_MEGATRON = r"""#!/bin/bash
# The same run by Megatron.
export HCCL_DETERMINISTIC=true
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=1
TP=1; PP=1
MBS=2
GA=4
GBS=$(($GPUS_PER_NODE*$NNODES/$TP/$PP*$MBS*$GA))

MODEL_ARGS="
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16 \
    --group-query-attention --num-query-groups 8 \
    --ffn-hidden-size 5504 --vocab-size 32000 --seq-length 4096 \
    --max-position-embeddings 4096 \
    --normalization RMSNorm --norm-epsilon 0.000001 \
    --swiglu --disable-bias-linear --untie-embeddings-and-output-weights \
    --position-embedding-type rope --rotary-base 500000 \
    --attention-dropout 0 --hidden-dropout 0
"
TRAIN_ARGS=(
    --micro-batch-size $MBS --global-batch-size ${GBS}
    --train-iters 2_000_PLACEHOLDER
    --lr 2e-5 --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.05
    --adam-beta2 0.95 --weight-decay=0.1 --clip-grad 1
    --bf16 --calculate-per-token-loss --seed 1234
)
torchrun --nproc_per_node $GPUS_PER_NODE --nnodes "$NNODES" pretrain_gpt.py $MODEL_ARGS "${TRAIN_ARGS[@]}"
""".replace("2_000_PLACEHOLDER", "2000")

_HF = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 0.00002,
    "lr_scheduler_type": "SchedulerType.COSINE",
    "warmup_steps": 0.05,
    "max_steps": 2000,
    "adam_beta2": "0.95",
    "weight_decay": 0.1,
    "bf16": "True",
    "seed": 1234,
    "optim": "adamw_torch",
    "max_length": 4096,
    "dataloader_num_workers": 1,
    "train_sampling_strategy": "sequential",
}

_DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 64,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "communication_data_type": "fp32",
    "zero_optimization": {"stage": 2, "overlap_comm": True},
    "optimizer": {"type": "Adam", "params": {"lr": "2e-5", "betas": [0.9, 0.95], "eps": 1e-08, "weight_decay": 0.1}},
}

_MINDSPORE = """
seed: 1234
runner_config: {epochs: 1, batch_size: 2, gradient_accumulation_steps: 4}
optimizer:
  type: AdamW
  betas: [0.9, 0.95]
  eps: 1.e-8
  weight_decay: 1.0e-1
lr_schedule:
  type: CosineWithWarmUpLR
  learning_rate: 2.e-5
  lr_end: 0
  warmup_ratio: 0.05
  total_steps: 2000
parallel_config: {data_parallel: 8, model_parallel: 1, pipeline_stage: 1, micro_batch_num: 16, use_seq_parallel: False}
model:
  model_config:
    type: LlamaConfig
    seq_length: 4096
    hidden_size: 2048
    num_layers: 24
    num_heads: 16
    n_kv_heads: 8
    vocab_size: 32000
    multiple_of: 128
    max_position_embedding: 4096
    rms_norm_eps: 1.0e-6
    hidden_act: 'swiglu'
    add_bias_linear: False
    qkv_has_bias: False
    tie_word_embeddings: False
    theta: 500000.
    extend_method: "None"
    attention_dropout: 0.0
    initializer_range: 0.02
    bos_token_id: 1
    eos_token_id: 2
    pad_token_id: 0
    compute_dtype: "bfloat16"
    param_init_type: "float32"
runner_wrapper: {type: MFTrainOneStepCell, scale_sense: 1.0, use_clip_grad: True}
"""

_TORCHTITAN = """
[optimizer]
name = "AdamW"
lr = 2e-5
beta2 = 0.95
weight_decay = 1e-1
[lr_scheduler]
warmup_steps = 100
decay_type = "cosine"
min_lr_factor = 0.0
[training]
local_batch_size = 2
global_batch_size = 64
seq_len = 4096
steps = 2000
mixed_precision_param = "bfloat16"
mixed_precision_reduce = "float32"
[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = 8
[debug]
seed = 1234
"""

FILES: dict[str, dict[str, str]] = {
    "megatron": {"run.sh": _MEGATRON},
    "hf": {"training_args.json": json.dumps(_HF), "config.json": json.dumps(CONFIG)},
    "deepspeed": {
        "ds_config.json": json.dumps(_DEEPSPEED),
        "training_args.json": json.dumps({k: v for k, v in _HF.items() if k != "learning_rate"}),
        "config.json": json.dumps(CONFIG),
    },
    "mindspore": {"pretrain.yaml": _MINDSPORE},
    "torchtitan": {"llama.toml": _TORCHTITAN, "config.json": json.dumps(CONFIG)},
}

# What the systems do otherwise by themselves, and nobody has changed: weight decay of biases and norms.
ALWAYS = {"torchtitan": {"weight_decay_of_biases_and_norms"}}
GIVEN = {"hf": {"world_size": "8"}, "deepspeed": {}}

_Change = tuple[set[str], str, str, str]
_IN_CONFIG: list[_Change] = [
    ({"num_layers"}, "config.json", '"num_hidden_layers": 24', '"num_hidden_layers": 22'),
    ({"norm_eps"}, "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    ({"rope_base"}, "config.json", '"rope_theta": 500000.0', '"rope_theta": 10000'),
    ({"tied_embeddings"}, "config.json", '"tie_word_embeddings": false', '"tie_word_embeddings": true'),
    ({"num_query_groups"}, "config.json", '"num_key_value_heads": 8', '"num_key_value_heads": 16'),
    ({"activation"}, "config.json", '"hidden_act": "silu"', '"hidden_act": "gelu"'),
    ({"eos_token_id"}, "config.json", '"eos_token_id": 2', '"eos_token_id": 3'),
]
CHANGES: dict[str, list[_Change]] = {
    "megatron": [
        ({"norm_eps"}, "run.sh", "--norm-epsilon 0.000001", ""),
        ({"ffn_hidden_size"}, "run.sh", "--ffn-hidden-size 5504", ""),
        ({"attention_dropout"}, "run.sh", "--attention-dropout 0", ""),
        ({"num_query_groups"}, "run.sh", "--group-query-attention", ""),
        ({"tied_embeddings"}, "run.sh", "--untie-embeddings-and-output-weights", ""),
        ({"normalization"}, "run.sh", "--normalization RMSNorm", "--normalization LayerNorm"),
        ({"rope_base"}, "run.sh", "--rotary-base 500000", ""),
        ({"bias_in_qkv"}, "run.sh", "--swiglu", "--swiglu --add-qkv-bias"),
        ({"activation"}, "run.sh", "--swiglu", ""),
        ({"global_batch_size", "gradient_accumulation_steps"}, "run.sh", "GA=4", "GA=8"),
        ({"learning_rate"}, "run.sh", "--lr 2e-5", "--lr 1e-5"),
        ({"warmup_steps"}, "run.sh", "--lr-warmup-fraction 0.05", "--lr-warmup-iters 50"),
        ({"min_learning_rate"}, "run.sh", "--min-lr 0", "--min-lr 1e-6"),
        ({"lr_schedule"}, "run.sh", "--lr-decay-style cosine", ""),
        ({"beta2"}, "run.sh", "--adam-beta2 0.95", ""),
        ({"weight_decay"}, "run.sh", "--weight-decay=0.1", ""),
        ({"clip_grad"}, "run.sh", "--clip-grad 1", "--clip-grad 0"),
        ({"loss_reduction"}, "run.sh", "--calculate-per-token-loss", ""),
        ({"compute_dtype", "grad_reduce_dtype"}, "run.sh", "--bf16", "--fp16"),
        ({"train_steps", "decay_steps", "warmup_steps"}, "run.sh", "--train-iters 2000", "--train-iters 1000"),
        ({"global_batch_size", "gradient_accumulation_steps"}, "run.sh", "TP=1;", "TP=2; X="),
        ({"seed"}, "run.sh", "--seed 1234", "--seed 42"),
        ({"hccl_deterministic"}, "run.sh", "HCCL_DETERMINISTIC=true", "HCCL_DETERMINISTIC=false"),
    ],
    "hf": [
        *_IN_CONFIG,
        ({"learning_rate"}, "training_args.json", '"learning_rate": 2e-05, ', ""),
        ({"lr_schedule"}, "training_args.json", "SchedulerType.COSINE", "linear"),
        ({"warmup_steps"}, "training_args.json", '"warmup_steps": 0.05', '"warmup_steps": 50'),
        ({"beta2"}, "training_args.json", '"adam_beta2": "0.95"', '"adam_beta1": "0.9"'),
        ({"eps"}, "training_args.json", '"bf16"', '"adam_epsilon": "1e-6", "bf16"'),
        ({"weight_decay"}, "training_args.json", '"weight_decay": 0.1, ', ""),
        ({"clip_grad"}, "training_args.json", '"bf16"', '"max_grad_norm": 0.5, "bf16"'),
        ({"compute_dtype"}, "training_args.json", '"bf16": "True"', '"bf16": "False"'),
        ({"loss_reduction"}, "training_args.json", '"bf16"', '"average_tokens_across_devices": false, "bf16"'),
        ({"label_smoothing"}, "training_args.json", '"bf16"', '"label_smoothing_factor": 0.1, "bf16"'),
        ({"embedding_noise"}, "training_args.json", '"bf16"', '"neftune_noise_alpha": 5, "bf16"'),
        (
            {"global_batch_size"},
            "training_args.json",
            '_size": 2',
            '_size": 4',
        ),
        ({"train_steps", "decay_steps", "warmup_steps"}, "training_args.json", "2000", "3000"),
        ({"sequence_length"}, "training_args.json", '"max_length": 4096', '"max_length": 2048'),
        ({"optimizer"}, "training_args.json", '"adamw_torch"', '"adafactor"'),
        ({"seed"}, "training_args.json", ', "seed": 1234', ""),
        ({"shuffled"}, "training_args.json", ', "train_sampling_strategy": "sequential"', ""),
    ],
    "deepspeed": [
        *_IN_CONFIG,
        ({"clip_grad"}, "ds_config.json", '"gradient_clipping": 1.0, ', ""),
        ({"grad_reduce_dtype"}, "ds_config.json", '"communication_data_type": "fp32", ', ""),
        ({"learning_rate"}, "ds_config.json", '"lr": "2e-5"', '"lr": 2e-4'),
        ({"beta2"}, "ds_config.json", "[0.9, 0.95]", "[0.9, 0.999]"),
        ({"eps"}, "ds_config.json", "1e-08", "1e-06"),
        ({"weight_decay"}, "ds_config.json", ', "weight_decay": 0.1', ""),
        ({"decoupled_weight_decay"}, "ds_config.json", '{"lr"', '{"adam_w_mode": false, "lr"'),
        ({"bias_correction"}, "ds_config.json", '{"lr"', '{"bias_correction": false, "lr"'),
        ({"compute_dtype"}, "ds_config.json", '"bf16": {', '"fp16": {"enabled": true}, "bf17": {'),
        ({"global_batch_size", "data_parallel_size"}, "ds_config.json", "64", "32"),
    ],
    "mindspore": [
        ({"clip_grad"}, "pretrain.yaml", "use_clip_grad: True", "use_clip_grad: False"),
        ({"eps"}, "pretrain.yaml", "  eps: 1.e-8\n", ""),
        ({"beta2"}, "pretrain.yaml", "[0.9, 0.95]", "[0.9, 0.999]"),
        ({"weight_decay"}, "pretrain.yaml", "  weight_decay: 1.0e-1\n", ""),
        ({"learning_rate"}, "pretrain.yaml", "learning_rate: 2.e-5", "learning_rate: 2.e-6"),
        ({"min_learning_rate"}, "pretrain.yaml", "lr_end: 0", "lr_end: 1.e-6"),
        ({"lr_schedule"}, "pretrain.yaml", "CosineWithWarmUpLR", "LinearWithWarmUpLR"),
        ({"warmup_steps"}, "pretrain.yaml", "warmup_ratio: 0.05", "warmup_ratio: 0"),
        ({"train_steps", "decay_steps", "warmup_steps"}, "pretrain.yaml", "total_steps: 2000", "total_steps: 4000"),
        ({"global_batch_size", "gradient_accumulation_steps"}, "pretrain.yaml", "steps: 4}", "steps: 2}"),
        ({"global_batch_size", "data_parallel_size"}, "pretrain.yaml", "data_parallel: 8", "data_parallel: 4"),
        ({"tensor_parallel_size"}, "pretrain.yaml", "model_parallel: 1", "model_parallel: 2"),
        # With pipeline stages a step takes so many micro-batches as well.
        ({"pipeline_parallel_size", "global_batch_size"}, "pretrain.yaml", "pipeline_stage: 1", "pipeline_stage: 2"),
        ({"compute_dtype"}, "pretrain.yaml", '"bfloat16"', '"float16"'),
        ({"parameter_dtype", "grad_reduce_dtype"}, "pretrain.yaml", '"float32"', '"bfloat16"'),
        ({"num_layers"}, "pretrain.yaml", "num_layers: 24", "num_layers: 2"),
        ({"norm_eps"}, "pretrain.yaml", "rms_norm_eps: 1.0e-6", "rms_norm_eps: 1.0e-5"),
        ({"ffn_hidden_size"}, "pretrain.yaml", "multiple_of: 128", "multiple_of: 256"),
        ({"num_query_groups"}, "pretrain.yaml", "    n_kv_heads: 8\n", ""),
        ({"rope_base"}, "pretrain.yaml", "theta: 500000.", "theta: 10000."),
        ({"sequence_length"}, "pretrain.yaml", "seq_length: 4096", "seq_length: 2048"),
        ({"tied_embeddings"}, "pretrain.yaml", "embeddings: False", "embeddings: True"),
        ({"pad_token_id"}, "pretrain.yaml", "pad_token_id: 0", "pad_token_id: 2"),
        ({"seed"}, "pretrain.yaml", "seed: 1234", "seed: 0"),
    ],
    "torchtitan": [
        *_IN_CONFIG,
        ({"learning_rate"}, "llama.toml", "lr = 2e-5", ""),
        ({"beta2"}, "llama.toml", "beta2 = 0.95", "beta2 = 0.999"),
        ({"weight_decay"}, "llama.toml", "weight_decay = 1e-1", "weight_decay = 0"),
        ({"warmup_steps"}, "llama.toml", "warmup_steps = 100", ""),
        ({"lr_schedule"}, "llama.toml", 'decay_type = "cosine"', ""),
        ({"min_learning_rate"}, "llama.toml", "min_lr_factor = 0.0", "min_lr_factor = 0.1"),
        ({"global_batch_size", "gradient_accumulation_steps"}, "llama.toml", "global_batch_size = 64", ""),
        ({"train_steps", "decay_steps"}, "llama.toml", "\nsteps = 2000", "\nsteps = 500"),
        ({"sequence_length"}, "llama.toml", "seq_len = 4096", ""),
        ({"compute_dtype"}, "llama.toml", 'param = "bfloat16"', 'param = "float32"'),
        ({"tensor_parallel_size"}, "llama.toml", "[debug]", "tensor_parallel_degree = 2\n[debug]"),
        ({"clip_grad"}, "llama.toml", "seq_len", "max_norm = 0.5\nseq_len"),
        ({"seed"}, "llama.toml", "seed = 1234", "seed = 7"),
    ],
}


def write(folder: Path, files: dict[str, str]) -> str:
    """Write the files of a side and return what names it on the command line."""
    for name, text in files.items():
        if text:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    return str(folder)
