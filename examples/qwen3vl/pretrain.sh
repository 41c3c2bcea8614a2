#!/usr/bin/env bash
# Fine-tune Qwen3-VL-8B under FSDP2. Run from the root of the repository:
#
#     bash examples/qwen3vl/pretrain.sh [further flags of pretrain_transformers.py]
#
# Every setting below can be given in the environment instead, for example
#
#     NPROC_PER_NODE=2 CONFIG_DIR=my_configs TRAIN_ITERS=100 bash examples/qwen3vl/pretrain.sh
set -euo pipefail

# Ascend: the toolkit's environment, where there is one.
ASCEND_ENV=${ASCEND_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}
if [ -f "$ASCEND_ENV" ]; then set +u; source "$ASCEND_ENV"; set -u; fi
export CUDA_DEVICE_MAX_CONNECTIONS=2 # FSDP2 overlaps communication with computation: must not be 1
export TOKENIZERS_PARALLELISM=false
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

NPROC_PER_NODE=${NPROC_PER_NODE:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
WORLD_SIZE=$((NPROC_PER_NODE * NNODES))

CONFIG_DIR=${CONFIG_DIR:-examples/qwen3vl} # data.json, model.json, fsdp2_config.yaml
LOAD_PATH=${LOAD_PATH:-}                   # a checkpoint to go on from; empty: the weights of init_from_hf_path
SAVE_PATH=${SAVE_PATH:-./ckpt/qwen3vl}
LOG_DIR=${LOG_DIR:-./logs}

TP=1
PP=1
CP=1
MBS=${MBS:-1}
GRAD_ACC_STEP=${GRAD_ACC_STEP:-4}
DP=$((WORLD_SIZE / TP / PP / CP))
GBS=$((MBS * GRAD_ACC_STEP * DP))
SEQ_LEN=${SEQ_LEN:-1024}
TRAIN_ITERS=${TRAIN_ITERS:-10000}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}

DISTRIBUTED_ARGS="
    --nproc_per_node $NPROC_PER_NODE \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR \
    --master_port $MASTER_PORT
"

GPT_ARGS="
    --use-mcore-models \
    --tensor-model-parallel-size $TP \
    --pipeline-model-parallel-size $PP \
    --context-parallel-size $CP \
    --micro-batch-size $MBS \
    --global-batch-size $GBS \
    --seq-length $SEQ_LEN \
    --tokenizer-type NullTokenizer \
    --vocab-size 151936 \
    --make-vocab-size-divisible-by 1 \
    --normalization RMSNorm \
    --swiglu \
    --use-fused-rmsnorm \
    --use-fused-swiglu \
    --use-flash-attn \
    --no-masked-softmax-fusion \
    --no-gradient-accumulation-fusion \
    --untie-embeddings-and-output-weights \
    --use-cpu-initialization \
    --init-model-with-meta-device \
    --use-torch-fsdp2 \
    --fsdp2-config-path $CONFIG_DIR/fsdp2_config.yaml \
    --ckpt-format torch_dcp \
    --optimizer-selection fused_torch_adamw \
    --lr ${LR:-1.0e-5} \
    --lr-decay-style cosine \
    --lr-warmup-fraction 0.1 \
    --weight-decay 0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.999 \
    --clip-grad 0.0 \
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
    --log-interval 1 \
    --log-tps \
    --eval-interval 10000 \
    --eval-iters 100
"

mkdir -p "$LOG_DIR"
LOG_FILE=$LOG_DIR/qwen3vl_$(date +%Y%m%d_%H%M%S).log
torchrun $DISTRIBUTED_ARGS pretrain_transformers.py \
    $GPT_ARGS \
    $MM_ARGS \
    $OUTPUT_ARGS \
    --distributed-backend ${BACKEND:-nccl} \
    "$@" 2>&1 | tee "$LOG_FILE"

# The mean leaves out the first steps, which are slower.
awk -F 'elapsed time per iteration \\(ms\\): ' -v gbs="$GBS" -v seq="$SEQ_LEN" '
    NF > 1 { n += 1; split($2, field, " "); if (n > 5) { sum += field[1]; counted += 1 } }
    END {
        if (!counted) exit
        ms = sum / counted
        printf "Elapsed Time Per iteration: %.1f ms\n", ms
        printf "Average Samples per Second: %.3f\n", gbs * 1000 / ms
        printf "Consumed Tokens per Second (at full length): %.1f\n", gbs * seq * 1000 / ms
    }' "$LOG_FILE"
