from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

import mindspeed_mm
from mindspeed_mm.arguments import inert_flags, report_inert_flags, validation
from mindspeed_mm.arguments.flag import ROADS, Flag, Inert, Refused
from mindspeed_mm.arguments.groups import FLAGS
from tests.arguments.lines import FSDP2, PRETRAIN_TRANSFORMERS, validated

PACKAGE = Path(mindspeed_mm.__file__).parent


def test_only_passed_flags_are_reported() -> None:
    assert report_inert_flags(validated(*FSDP2), "fsdp2") == []


def test_published_line() -> None:
    lines = report_inert_flags(validated(*PRETRAIN_TRANSFORMERS, world_size=8), "fsdp2")
    assert lines[0] == "no effect: --use-cpu-initialization (weights are always created on the CPU or the meta device)"
    named = {word for line in lines for word in line.split() if word.startswith("--")}
    expected = """
        --use-mcore-models --context-parallel-algo --tokenizer-type --vocab-size --make-vocab-size-divisible-by
        --normalization --swiglu --use-fused-rmsnorm --use-fused-swiglu --use-flash-attn --use-cpu-initialization
        --no-gradient-accumulation-fusion --no-masked-softmax-fusion --untie-embeddings-and-output-weights
    """
    assert named == set(shlex.split(expected))


def test_flags_that_need_another() -> None:
    args = validated(*FSDP2, "--lr-mult", "2", "--sgd-momentum", "0.5", "--tensorboard-log-interval", "3")
    assert report_inert_flags(args, "fsdp2") == [
        "no effect: --sgd-momentum (it is read only with --optimizer sgd)",
        "no effect: --lr-mult (it is read only with --lr-scale-modules)",
        "no effect: --tensorboard-log-interval (it is read only with --tensorboard-dir or --wandb-project)",
    ]
    args = validated(*FSDP2, "--lr-warmup-init", "1e-7", "--lr-warmup-fraction", "0")
    assert report_inert_flags(args, "fsdp2") == [
        "no effect: --lr-warmup-init (it is read only with --lr-warmup-iters or --lr-warmup-fraction)"
    ]
    args = validated(*FSDP2, "--optimizer", "sgd", "--sgd-momentum", "0.5", "--tensorboard-dir", "t")
    assert report_inert_flags(args, "fsdp2") == []
    args = validated(*FSDP2, "--tensorboard-log-interval", "3", "--wandb-project", "p", "--wandb-exp-name", "n")
    assert report_inert_flags(args, "fsdp2") == []


@pytest.mark.parametrize("road", ROADS)
def test_declarations(road: str) -> None:
    assert set(inert_flags(road)) <= {flag.dest for flag in FLAGS.values()}
    for flag in FLAGS.values():
        if flag.needs:
            assert flag.needs.split()[0] in FLAGS, flag.name
        status = flag.status(road)
        assert status is None or (status.reason if isinstance(status, Inert) else status.fix)


@pytest.mark.skipif(
    not [path for path in (PACKAGE / "training").glob("*.py") if path.name != "__init__.py"],
    reason="nothing reads the arguments without the training package",
)
def test_every_other_flag_is_read_somewhere() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if "arguments" not in path.parts]
    sources = [path.read_text(encoding="utf-8") for path in [*files, *PACKAGE.parent.glob("pretrain_*.py")]]
    sources += [
        inspect.getsource(f)
        for name, f in vars(validation).items()
        if name.startswith(("_derive", "validate", "road_of"))
    ]
    read = set(re.findall(r"\bargs\.(\w+)", "\n".join(sources)))
    for source in sources:
        if "getattr(args, " in source:  # there the name is a string, perhaps from a table
            read |= set(re.findall(r"""["'](\w+)["']""", source))
    promised = {flag.dest for flag in FLAGS.values() if _takes_effect(flag)}
    assert promised <= read, f"accepted but never read: {sorted(promised - read)}"


def _takes_effect(flag: Flag) -> bool:
    """Whether some value of ``flag`` other than the default is promised an effect on the FSDP2 road."""
    if isinstance(flag.fsdp2, Inert) or (isinstance(flag.fsdp2, Refused) and not flag.fsdp2.allowed):
        return False
    if flag.needs is None:
        return True
    name, *wanted = flag.needs.split()
    needed = FLAGS[name]
    if isinstance(needed.fsdp2, Refused):
        return bool(wanted) and wanted[0] in (needed.default, *needed.fsdp2.allowed)
    return _takes_effect(needed)
