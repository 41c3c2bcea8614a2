"""Command lines that the tests share."""

from __future__ import annotations

import argparse
import shlex

from mindspeed_mm.arguments import parse_args, validate_args

FSDP2 = ("--use-torch-fsdp2", "--lr", "1e-5", "--train-iters", "100")

PRETRAIN_TRANSFORMERS = shlex.split("""
    --use-mcore-models --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
    --context-parallel-size 1 --context-parallel-algo ulysses_cp_algo
    --micro-batch-size 1 --global-batch-size 8 --seq-length 1024 --num-workers 8
    --tokenizer-type NullTokenizer --vocab-size 152064 --make-vocab-size-divisible-by 1
    --normalization RMSNorm --swiglu --use-fused-rmsnorm --use-fused-swiglu --use-flash-attn
    --no-masked-softmax-fusion --no-gradient-accumulation-fusion --untie-embeddings-and-output-weights
    --lr 1.0e-5 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0
    --adam-beta1 0.9 --adam-beta2 0.999 --clip-grad 0.0 --train-iters 10000 --seed 42
    --optimizer-selection fused_torch_adamw --use-cpu-initialization
    --use-torch-fsdp2 --fsdp2-config-path fsdp2_config.yaml --init-model-with-meta-device
    --calculate-per-token-loss --ckpt-format torch_dcp
    --load ckpt --save out --no-load-optim --no-load-rng --no-save-optim --no-save-rng
    --log-interval 1 --save-interval 10000 --eval-interval 10000 --eval-iters 5000 --log-tps
    --mm-data data.json --mm-model model.json --mm-tool tools.json
    --distributed-backend nccl --distributed-timeout-minutes 60
""")

PRETRAIN_VLM = shlex.split("""
    --use-mcore-models --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    --context-parallel-size 1 --context-parallel-algo megatron_cp_algo --expert-model-parallel-size 2
    --micro-batch-size 1 --global-batch-size 8 --seq-length 1024 --num-workers 8
    --tokenizer-type NullTokenizer --vocab-size 152064 --make-vocab-size-divisible-by 1
    --normalization RMSNorm --swiglu --use-fused-rmsnorm --use-fused-swiglu --use-flash-attn
    --position-embedding-type rope --rotary-base 1000000 --attention-dropout 0.0 --hidden-dropout 0.0
    --no-masked-softmax-fusion --no-gradient-accumulation-fusion --untie-embeddings-and-output-weights
    --lr 1.0e-5 --min-lr 0.0 --lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.05
    --adam-beta1 0.9 --adam-beta2 0.999 --clip-grad 1.0 --train-iters 10000 --seed 42
    --use-cpu-initialization --no-initialization --init-model-with-meta-device --bf16 --variable-seq-lengths
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --sequence-parallel
    --moe-token-dispatcher-type alltoall --moe-permute-fusion --moe-grouped-gemm
    --lora-r 8 --lora-alpha 16 --lora-target-modules linear_qkv linear_proj --load-base-model base
    --ckpt-format torch --load ckpt --save out --no-load-optim --no-load-rng --no-save-optim --no-save-rng
    --log-interval 1 --save-interval 10000 --eval-interval 10000 --eval-iters 5000 --log-tps
    --mm-data data.json --mm-model model.json --mm-tool tools.json
    --distributed-backend nccl --distributed-timeout-minutes 60
""")

CUSTOM_MODEL = shlex.split("""
    --micro-batch-size 1 --global-batch-size 8 --num-workers 8 --lr 1e-5 --min-lr 1e-5
    --adam-beta1 .9 --adam-beta2 .999 --adam-eps 1e-8 --lr-decay-style constant --weight-decay 1e-2
    --lr-warmup-init 0 --lr-warmup-iters 0 --clip-grad 1.0 --train-iters 5000
    --no-gradient-accumulation-fusion --use-torch-fsdp2 --fsdp2-config-path fsdp2_config.yaml
    --untie-embeddings-and-output-weights --mm-data data.json --mm-model model.json --mm-tool tools.json
    --log-interval 1 --save-interval 10000 --eval-interval 10000 --eval-iters 10
    --ckpt-format torch_dcp --distributed-backend nccl
""")


def validated(*argv: str, world_size: int = 1) -> argparse.Namespace:
    """Parse and validate ``argv`` as a job of ``world_size`` ranks would."""
    args = parse_args(argv=argv)
    validate_args(args, world_size)
    return args
