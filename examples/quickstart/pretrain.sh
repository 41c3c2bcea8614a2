#!/usr/bin/env bash
# Train the quickstart's model from random weights on two CPU processes. prepare.py must have run before.
#
#     bash examples/quickstart/pretrain.sh [further flags of pretrain_transformers.py]
#
# The same script runs on GPUs and NPUs: it names no device, and the framework takes the one that is there.
set -euo pipefail

export CUDA_DEVICE_MAX_CONNECTIONS=2
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one core for each process

NPROC_PER_NODE=${NPROC_PER_NODE:-2}
CONFIG_DIR=${CONFIG_DIR:-examples/quickstart}
LOAD_PATH=${LOAD_PATH:-}
SAVE_PATH=${SAVE_PATH:-runs/quickstart/ckpt}
GBS=64

DISTRIBUTED_ARGS="
    --standalone \
    --nproc_per_node $NPROC_PER_NODE
"

GPT_ARGS="
    --use-torch-fsdp2 \
    --fsdp2-config-path $CONFIG_DIR/fsdp2_config.yaml \
    --untie-embeddings-and-output-weights \
    --no-gradient-accumulation-fusion \
    --micro-batch-size $((GBS / NPROC_PER_NODE)) \
    --global-batch-size $GBS \
    --seq-length 64 \
    --train-iters 360 \
    --optimizer-selection fused_torch_adamw \
    --lr 1.0e-3 \
    --min-lr 0.0 \
    --lr-decay-style cosine \
    --lr-warmup-fraction 0.1 \
    --weight-decay 0.1 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --clip-grad 1.0 \
    --calculate-per-token-loss \
    --seed 42 \
    --num-workers 1
"

MM_ARGS="
    --mm-data $CONFIG_DIR/data.json \
    --mm-model $CONFIG_DIR/model.json
"

OUTPUT_ARGS="
    ${LOAD_PATH:+--load $LOAD_PATH} \
    --save $SAVE_PATH \
    --save-interval 60 \
    --ckpt-format torch_dcp \
    --log-interval 20
"

torchrun $DISTRIBUTED_ARGS pretrain_transformers.py \
    $GPT_ARGS \
    $MM_ARGS \
    $OUTPUT_ARGS \
    --distributed-backend nccl \
    "$@"
