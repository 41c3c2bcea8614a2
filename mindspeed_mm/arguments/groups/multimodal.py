"""The configuration files of a run, and how its batches are put together."""

from __future__ import annotations

from pathlib import Path

from mindspeed_mm.arguments.flag import PATH, REPEATED, SWITCH, TEXT, Flag, Group, Inert, integer

PACKAGED_TOOLS = str(Path(__file__).resolve().parents[2] / "tools" / "tools.json")

_ONE_WAY = Inert("--use-data-balance spreads tokens and images of every micro-batch, in one way")

MULTIMODAL = Group(
    "configuration files",
    (
        Flag("--mm-data", PATH, "", "data.json (or .yaml): the dataset and the dataloader"),
        Flag("--mm-model", PATH, "", "model.json (or .yaml): the model, what is frozen, and the loss"),
        Flag("--mm-tool", PATH, PACKAGED_TOOLS, "tools.json (or .yaml): profiler and memory snapshots"),
        Flag("--plugin", REPEATED, [], "your own file or module to import first, for its registrations; repeatable"),
        Flag("--trust-remote-code", SWITCH, False, "allow Python code from the model folder to run"),
    ),
)

BALANCE = Group(
    "batching and balance across ranks",
    (
        Flag(
            "--use-txt-dynamic-batching",
            SWITCH,
            False,
            "fill micro-batches up to a number of tokens; --global-batch-size counts micro-batches then",
        ),
        Flag(
            "--max-seq-len",
            integer(1),
            2048,
            "token budget of one micro-batch, padding included",
            needs="--use-txt-dynamic-batching",
        ),
        Flag(
            "--dynamic-batch-buffer-size",
            integer(1),
            200,
            "samples looked at when a micro-batch is filled",
            needs="--use-txt-dynamic-batching",
        ),
        Flag(
            "--use-data-balance",
            SWITCH,
            False,
            "spread the tokens and images of a global batch evenly over data-parallel ranks",
        ),
        Flag(
            "--data_balance_sorting_algo",
            TEXT,
            "post_global_balancing_greedy_without_pad",
            "how images are spread",
            fsdp2=_ONE_WAY,
            megatron=_ONE_WAY,
        ),
        Flag(
            "--use-image-mbs-data-balance",
            SWITCH,
            False,
            "balance images per micro-batch",
            fsdp2=_ONE_WAY,
            megatron=_ONE_WAY,
        ),
        Flag(
            "--mbs_data_balance_sorting_algo",
            TEXT,
            "post_mbs_balancing_greedy_without_pad",
            "how images are spread per micro-batch",
            fsdp2=_ONE_WAY,
            megatron=_ONE_WAY,
        ),
        Flag(
            "--encoder-dp-balance",
            SWITCH,
            False,
            "spread the vision encoder's work over ranks",
            fsdp2=_ONE_WAY,
            megatron=_ONE_WAY,
        ),
    ),
)
