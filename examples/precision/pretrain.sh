#!/usr/bin/env bash
# Train the digits of the alignment guide on two CPU processes; prepare.py must have run before.
#
#     bash examples/precision/pretrain.sh [further flags of pretrain_transformers.py]
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=2
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

NPROC_PER_NODE=${NPROC_PER_NODE:-2}
GBS=8

GPT_ARGS="
    --use-torch-fsdp2 \
    --fsdp2-config-path examples/precision/fsdp2_config.yaml \
    --mm-data examples/precision/data.json \
    --mm-model examples/precision/model_ported.json \
    --micro-batch-size $((GBS / NPROC_PER_NODE)) \
    --global-batch-size $GBS \
    --seq-length 64 \
    --train-iters 60 \
    --lr 1.0e-3 \
    --lr-decay-style cosine \
    --lr-warmup-fraction 0.1 \
    --weight-decay 0.1 \
    --clip-grad 1.0 \
    --ckpt-format torch_dcp \
    --log-interval 20 \
    --eval-iters 0 \
    --num-workers 0 \
    --precision-capture steps=0-1
"

torchrun --standalone --nproc_per_node $NPROC_PER_NODE pretrain_transformers.py $GPT_ARGS "$@"
