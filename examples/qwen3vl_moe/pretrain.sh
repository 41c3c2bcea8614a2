#!/usr/bin/env bash
# Fine-tune Qwen3-VL-30B-A3B with megatron-core's parallelism. Run from the root of the repository:
#
#     bash examples/qwen3vl_moe/pretrain.sh [--tiny] [further flags of pretrain_vlm.py]
#
# --tiny trains a model of the same family and a few hundred thousand parameters on handwritten digits: on two
# processes, in a minute on a laptop, with nothing downloaded. Every setting below can be given in the environment
# instead, for example
#
#     NPROC_PER_NODE=4 TP=2 PP=2 bash examples/qwen3vl_moe/pretrain.sh --tiny
set -euo pipefail

# Ascend: the toolkit's environment, where there is one.
ASCEND_ENV=${ASCEND_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}
if [ -f "$ASCEND_ENV" ]; then set +u; source "$ASCEND_ENV"; set -u; fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # in this order Megatron's transfers overlap
export TOKENIZERS_PARALLELISM=false
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ "${1:-}" = "--tiny" ]; then
    shift
    CONFIG_DIR=${CONFIG_DIR:-runs/qwen3vl_moe-tiny}
    python examples/tiny.py qwen3_vl_moe "$CONFIG_DIR" --configs examples/qwen3vl_moe/tiny
    SAVE_PATH=${SAVE_PATH:-$CONFIG_DIR/ckpt}
    LOG_DIR=${LOG_DIR:-$CONFIG_DIR/logs}
    NPROC_PER_NODE=${NPROC_PER_NODE:-2} NNODES=${NNODES:-1}
    TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} EP=${EP:-2}
    PRECISION=""
    GRAD_ACC_STEP=${GRAD_ACC_STEP:-4}
    SEQ_LEN=${SEQ_LEN:-64}
    TRAIN_ITERS=${TRAIN_ITERS:-20}
    LR=${LR:-5.0e-3}
    NUM_WORKERS=${NUM_WORKERS:-0}
    MASTER_PORT=${MASTER_PORT:-29517}
fi

NPROC_PER_NODE=${NPROC_PER_NODE:-8}
NNODES=${NNODES:-2}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
WORLD_SIZE=$((NPROC_PER_NODE * NNODES))

CONFIG_DIR=${CONFIG_DIR:-examples/qwen3vl_moe} # data.json, model.json
LOAD_PATH=${LOAD_PATH:-}                       # a checkpoint to go on from; empty: the weights of init_from_hf_path
SAVE_PATH=${SAVE_PATH:-./ckpt/qwen3vl_moe}
LOG_DIR=${LOG_DIR:-./logs}

TP=${TP:-1}
PP=${PP:-2}
CP=${CP:-1}
EP=${EP:-8}
CP_ALGO=${CP_ALGO:-megatron_cp_algo} # or ulysses_cp_algo; what CP does with attention
MBS=${MBS:-1}
GRAD_ACC_STEP=${GRAD_ACC_STEP:-16}
DP=$((WORLD_SIZE / TP / PP / CP))
GBS=$((MBS * GRAD_ACC_STEP * DP))
SEQ_LEN=${SEQ_LEN:-4096}
TRAIN_ITERS=${TRAIN_ITERS:-10000}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}

DISTRIBUTED_ARGS="
    --nproc_per_node $NPROC_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT
"

PARALLEL_ARGS="
    --tensor-model-parallel-size $TP \
    --pipeline-model-parallel-size $PP \
    --context-parallel-size $CP \
    --context-parallel-algo $CP_ALGO \
    --expert-model-parallel-size $EP \
    --moe-token-dispatcher-type ${MOE_DISPATCHER:-alltoall} \
    --moe-grouped-gemm \
    --use-distributed-optimizer
"
# Activations are shared by tensor-parallel ranks as well.
if [ "$TP" -gt 1 ]; then PARALLEL_ARGS="$PARALLEL_ARGS --sequence-parallel"; fi

GPT_ARGS="
    --use-mcore-models \
    --micro-batch-size $MBS \
    --global-batch-size $GBS \
    --seq-length $SEQ_LEN \
    --variable-seq-lengths \
    --tokenizer-type NullTokenizer \
    --normalization RMSNorm \
    --swiglu \
    --use-fused-rmsnorm \
    --use-fused-swiglu \
    --use-flash-attn \
    --no-masked-softmax-fusion \
    --no-gradient-accumulation-fusion \
    ${PRECISION---bf16} \
    --lr ${LR:-1.0e-5} \
    --min-lr 0.0 \
    --lr-decay-style cosine \
    --lr-warmup-fraction 0.1 \
    --weight-decay 0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --clip-grad 1.0 \
    --calculate-per-token-loss \
    --train-iters $TRAIN_ITERS \
    --seed 42 \
    --num-workers ${NUM_WORKERS:-8}
"

MM_ARGS="
    --mm-data $CONFIG_DIR/data.json \
    --mm-model $CONFIG_DIR/model.json \
    --mm-tool ${MM_TOOL:-mindspeed_mm/tools/tools.json}
"

OUTPUT_ARGS="
    ${LOAD_PATH:+--load $LOAD_PATH} \
    --save $SAVE_PATH \
    --save-interval $SAVE_INTERVAL \
    --ckpt-format torch_dist \
    --log-interval 1 \
    --log-tps \
    --eval-interval 10000 \
    --eval-iters 0
"

mkdir -p "$LOG_DIR"
torchrun $DISTRIBUTED_ARGS pretrain_vlm.py \
    $PARALLEL_ARGS \
    $GPT_ARGS \
    $MM_ARGS \
    $OUTPUT_ARGS \
    --distributed-backend ${BACKEND:-nccl} \
    "$@" 2>&1 | tee "$LOG_DIR/qwen3vl_moe_$(date +%Y%m%d_%H%M%S).log"
