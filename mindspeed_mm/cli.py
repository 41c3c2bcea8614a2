"""The commands ``mindspeed-mm`` and ``mm-convert``. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mindspeed_mm.checkpoint import commands
from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.precision import commands as precision_commands

app = typer.Typer(
    help="MindSpeed-MM: multimodal training on NPU, CUDA and CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(help="Convert weights between Hugging Face folders and checkpoints.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")
app.add_typer(commands.app, name="checkpoint")
app.add_typer(precision_commands.app, name="precision")
data_app = typer.Typer(help="Prepare the data of data.json, and look at them.", no_args_is_help=True)
app.add_typer(data_app, name="data")


class Dtype(str, Enum):
    """What to write parameters in; the names are torch's."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(str, Enum):
    """Which weights of a checkpoint to write."""

    trained = "trained"
    ema = "ema"


_TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let Python files of the folder run.")]


@convert_app.command("hf-to-dcp")
def hf_to_dcp(
    hf_dir: Annotated[Path, typer.Option(help="Hugging Face folder with safetensors weights.")],
    dcp_dir: Annotated[Path, typer.Option(help="Folder to pass to --load; gets release/ and the tracker file.")],
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Hugging Face folder to checkpoint. Not needed to train: init_from_hf_path reads the folder directly."""
    from mindspeed_mm.checkpoint import convert

    path = convert.hf_to_dcp(hf_dir, dcp_dir, trust_remote_code)
    print(f"wrote {path}; train from it with --load {dcp_dir}")


@convert_app.command("dcp-to-hf")
def dcp_to_hf(
    load_dir: Annotated[Path, typer.Option(help="A checkpoint (iter_0000100) or the folder that holds it.")],
    save_dir: Annotated[Path, typer.Option(help="Folder to write; from_pretrained loads it.")],
    model_assets_dir: Annotated[Path, typer.Option(help="The original Hugging Face folder: config, tokenizer.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Parameter dtype to write; default: as trained.")] = None,
    weights: Annotated[Weights, typer.Option(help="ema: the averages of fused_ema_adamw.")] = Weights.trained,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Checkpoint to Hugging Face folder."""
    import torch

    from mindspeed_mm.checkpoint import convert

    torch_dtype = getattr(torch, dtype.value) if dtype else None
    averaged = weights is Weights.ema
    path = convert.dcp_to_hf(load_dir, save_dir, model_assets_dir, torch_dtype, trust_remote_code, averaged)
    print(f"wrote {path}; load it with from_pretrained")


@convert_app.command("lora-merge")
def lora_merge(
    hf_dir: Annotated[Path, typer.Option(help="Hugging Face folder of the weights under the adapters.")],
    adapter: Annotated[Path, typer.Option(help="An adapter folder, or a checkpoint of a LoRA run.")],
    save_dir: Annotated[Path, typer.Option(help="Folder to write; from_pretrained loads it.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Parameter dtype to write; default: that of --hf-dir.")] = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Add adapters (LoRA) to the weights they were trained on: a full Hugging Face folder."""
    import torch

    from mindspeed_mm.checkpoint.lora_merge import lora_merge

    torch_dtype = getattr(torch, dtype.value) if dtype else None
    path = lora_merge(hf_dir, adapter, save_dir, torch_dtype, trust_remote_code)
    print(f"wrote {path}; load it with from_pretrained")


_MMData = Annotated[Path, typer.Option(help="data.json.")]
_SeqLength = Annotated[int | None, typer.Option(help="As in training: the longest sample, in tokens.")]
_Workers = Annotated[int, typer.Option(help="Processes; 0: as many as there are cores.")]


@data_app.command("prepare")
def data_prepare(
    mm_data: _MMData,
    seq_length: _SeqLength = None,
    workers: _Workers = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Prepare again what the cache has.")] = False,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Look at every sample before training. Can be interrupted, and run on several nodes that share the cache."""
    from mindspeed_mm.data import commands

    options = argparse.Namespace(mm_data=mm_data, seq_length=seq_length, trust_remote_code=trust_remote_code)
    commands.prepare_command(options, workers or _cores(), overwrite)


@data_app.command("inspect")
def data_inspect(
    mm_data: _MMData,
    seq_length: _SeqLength = None,
    samples: Annotated[int, typer.Option(help="How many samples to render.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and the histograms.")] = None,
    workers: _Workers = 0,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Show what the data are: counts, lengths, bad rows and why, and samples with what is trained on marked."""
    from mindspeed_mm.data import commands

    options = argparse.Namespace(mm_data=mm_data, seq_length=seq_length, trust_remote_code=trust_remote_code)
    commands.inspect_command(options, workers or _cores(), samples, out)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resplit(source_dir: Path, target_dir: Path, trust_remote_code: bool = False) -> None:
    """Copy a checkpoint as it is: any parallel layout reads what any other has written."""
    from mindspeed_mm.checkpoint import convert

    path = convert.copy_checkpoint(source_dir, target_dir)
    print(f"copied to {path}; there was nothing to split: any parallel layout loads it, {source_dir} as well")


# The documented converters differ in how they call the same folders.
_CONVERTERS = (
    "Qwen3VLConverter",
    "ExpertMergeDcpConverter",
    "GenericDCPConverter",
    # Of Megatron models, which here have the same checkpoints.
    "Qwen2VLConverter",
    "Qwen2_5_VLConverter",
    "InternVLConverter",
)
_METHODS: dict[str, tuple[Callable[..., None], dict[str, tuple[str, ...]]]] = {
    "hf_to_dcp": (hf_to_dcp, {"hf_dir": ("hf_dir",), "dcp_dir": ("dcp_dir", "save_dir")}),
    "dcp_to_hf": (
        dcp_to_hf,
        {
            "load_dir": ("load_dir", "dcp_dir"),
            "save_dir": ("save_dir",),
            "model_assets_dir": ("model_assets_dir", "hf_dir"),
        },
    ),
    "hf_to_mm": (hf_to_dcp, {"hf_dir": ("cfg.hf_config.hf_dir", "hf_dir"), "dcp_dir": ("cfg.mm_dir", "dcp_dir")}),
    "mm_to_hf": (
        dcp_to_hf,
        {
            "load_dir": ("cfg.mm_dir", "load_dir"),
            "save_dir": ("cfg.save_hf_dir", "save_dir"),
            "model_assets_dir": ("cfg.hf_config.hf_dir", "model_assets_dir"),
        },
    ),
    "resplit": (
        resplit,
        {"source_dir": ("cfg.source_dir", "cfg.mm_dir"), "target_dir": ("cfg.target_dir", "save_dir")},
    ),
}
_PATHS = dict.fromkeys(name for _, wanted in _METHODS.values() for names in wanted.values() for name in names)
# What upstream's converters must be told and ours read from the model: names, ties, fused layouts.
_NOT_NEEDED = ("tie_weight", "dcp_prefix", "hf_prefix", "tie_weight_mapping", "fused_linear_names")


def _documented_command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mm-convert", allow_abbrev=False)
    parser.add_argument("converter", help=f"one of {', '.join(_CONVERTERS)}")
    parser.add_argument("method", choices=_METHODS)
    for name in _PATHS:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=Path)
    for name in ("trust_remote_code", *_NOT_NEEDED):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="true", default="false")
    args, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-") and not word.startswith("--cfg.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if layout := [word for word in rest if word.startswith("--cfg.")]:
        print(f"{' '.join(layout)}: not needed, a checkpoint has no parallel layout", file=sys.stderr)
    if args.converter not in _CONVERTERS:
        known = ", ".join(_CONVERTERS)
        raise UserError(
            f"mm-convert: no converter {args.converter}; there are {known}.{did_you_mean(args.converter, _CONVERTERS)}"
        )
    for name in _NOT_NEEDED:
        if (value := getattr(args, name)) != "false":
            print(f"--{name} {value}: not needed, the model itself says it", file=sys.stderr)
    function, wanted = _METHODS[args.method]
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code.lower() == "true"}
    for name, spellings in wanted.items():
        options[name] = next((v for s in spellings if (v := getattr(args, s)) is not None), None)
        if options[name] is None:
            flags = " or ".join(f"--{s}" for s in spellings)
            raise UserError(f"mm-convert {args.converter} {args.method}: {flags} is missing")
    function(**options)


def _guarded(command: Callable[[], object]) -> None:
    """Run a command; a user's mistake or a disk's refusal is one message and exit code 1, not a traceback."""
    try:
        command()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """Entry of ``mindspeed-mm``."""
    _guarded(lambda: app(prog_name="mindspeed-mm"))


def mm_convert() -> None:
    """Entry of ``mm-convert <converter> <method> --options``: the documented commands, done by `convert`."""
    _guarded(lambda: _documented_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
