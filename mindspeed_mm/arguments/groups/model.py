"""What Megatron wants to know about a text decoder. With FSDP2 the model's own configuration says all of it."""

from __future__ import annotations

from mindspeed_mm.arguments.flag import SWITCH, SWITCH_OFF, TEXT, Flag, Group, Inert, Refused, integer, one_of, real

_CONFIG = Inert("the model's own configuration decides it")
_FILE = Inert("model.json and its Hugging Face folder decide it")
_KERNEL = Inert("the device's own kernel is used where there is one")
_CODE = Inert("the model's own code and its attn_implementation decide it")
_TOKENIZER = Inert("the tokenizer comes from the model's own folder")
_ALWAYS = Inert("there is no other kind")

MODEL = Group(
    "model shape",
    (
        Flag("--num-layers", integer(1), None, "transformer layers", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--hidden-size", integer(1), None, "width of a token", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--ffn-hidden-size", integer(1), None, "inner width of an MLP", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--num-attention-heads", integer(1), None, "query heads", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--group-query-attention", SWITCH, False, "share key and value heads", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--num-query-groups", integer(1), 1, "key and value heads", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--max-position-embeddings", integer(1), None, "longest position", fsdp2=_CONFIG, megatron=_FILE),
        Flag(
            "--position-embedding-type",
            one_of("learned_absolute", "rope", "mrope", "none"),
            "learned_absolute",
            "how positions are encoded",
            fsdp2=_CONFIG,
            megatron=_FILE,
        ),
        Flag("--rotary-base", integer(1), 10000, "base of the rotary period", fsdp2=_CONFIG, megatron=_FILE),
        Flag(
            "--normalization",
            one_of("LayerNorm", "RMSNorm"),
            "LayerNorm",
            "kind of norm",
            fsdp2=_CONFIG,
            megatron=_FILE,
        ),
        Flag("--swiglu", SWITCH, False, "gated linear units with SiLU", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--attention-dropout", real(0, 1), 0.1, "dropout after softmax", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--hidden-dropout", real(0, 1), 0.1, "dropout of hidden states", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--vocab-size", integer(1), None, "vocabulary before padding", fsdp2=_CONFIG, megatron=_FILE),
        Flag("--padded-vocab-size", integer(1), None, "vocabulary after padding", fsdp2=_CONFIG, megatron=_FILE),
        Flag(
            "--make-vocab-size-divisible-by",
            integer(1),
            128,
            "rows of the vocabulary on each tensor-parallel rank are a multiple of it; files have no such padding",
            fsdp2=_CONFIG,
        ),
        Flag(
            "--untie-embeddings-and-output-weights",
            SWITCH,
            False,
            "separate output weights",
            fsdp2=_CONFIG,
            megatron=_FILE,
        ),
        Flag("--tokenizer-type", TEXT, None, "tokenizer class", fsdp2=_TOKENIZER, megatron=_TOKENIZER),
        Flag("--use-mcore-models", SWITCH, False, "Megatron-Core layers", fsdp2=_CONFIG, megatron=_ALWAYS),
        Flag(
            "--downcast-to-bf16",
            SWITCH,
            False,
            "round loaded weights to bfloat16",
            fsdp2=Refused("loaded weights are not rounded; remove it, or set param_dtype: bf16 in --fsdp2-config-path"),
            megatron=Refused("loaded weights are not rounded; remove it, or add --bf16"),
        ),
    ),
)

KERNELS = Group(
    "kernels",
    (
        Flag("--use-flash-attn", SWITCH, False, "flash attention", fsdp2=_CODE, megatron=_KERNEL),
        Flag("--use-fused-rmsnorm", SWITCH, False, "fused RMSNorm", fsdp2=_CODE, megatron=_KERNEL),
        Flag("--use-fused-swiglu", SWITCH, False, "fused SwiGLU", fsdp2=_CODE),
        Flag("--use-fused-rotary-pos-emb", SWITCH, False, "fused rotary embedding", fsdp2=_CODE),
        Flag(
            "--no-masked-softmax-fusion",
            SWITCH_OFF,
            True,
            "plain softmax",
            dest="masked_softmax_fusion",
            fsdp2=_CODE,
            megatron=Inert("softmax is part of the attention kernel"),
        ),
        Flag(
            "--no-gradient-accumulation-fusion",
            SWITCH_OFF,
            True,
            "accumulate weight gradients outside the matrix product",
            dest="gradient_accumulation_fusion",
            fsdp2=Inert("gradients are never accumulated inside a matrix product"),
            megatron=Inert("gradients are never accumulated inside a matrix product"),
        ),
        Flag(
            "--jit-compile",
            SWITCH,
            False,
            "compile Ascend operators at run time",
            fsdp2=Inert("the device's precompiled operators are used"),
            megatron=Inert("the device's precompiled operators are used"),
        ),
        Flag(
            "--allow-internal-format",
            SWITCH,
            False,
            "Ascend's private tensor formats",
            fsdp2=Inert("sharded tensors keep the plain format"),
            megatron=Inert("tensors keep the plain format"),
        ),
    ),
)

MOE = Group(
    "mixture of experts",
    (
        Flag(
            "--moe-token-dispatcher-type",
            one_of("allgather", "alltoall", "flex", "alltoall_seq", "alltoall_mc2"),
            "allgather",
            "how tokens reach the experts: allgather or alltoall, which is also taken where nothing is passed",
            fsdp2=_CODE,
            megatron=Refused("it needs MindSpeed or DeepEP; use alltoall or allgather", ("alltoall",)),
        ),
        Flag("--moe-permute-fusion", SWITCH, False, "fused permute and unpermute", fsdp2=_CODE),
        Flag("--moe-grouped-gemm", SWITCH, False, "all local experts in one matrix product", fsdp2=_CODE),
    ),
)
