"""The CPU's answers for CUDA: each is needed, each is used, and nothing else changes."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mindspeed_mm.accelerator import megatron_cpu
from mindspeed_mm.accelerator.megatron_core import load_megatron_core
from mindspeed_mm.distributed import state
from tests.ranks import RankPool

OLD = version("megatron-core").startswith("0.12.")
ANSWERS = [(module, name) for module, names in megatron_cpu.STAND_INS.items() for name in sorted(names)]


def source(module: str) -> str:
    load_megatron_core()
    return inspect.getsource(importlib.import_module(f"megatron.core.{module}"))


@pytest.mark.parametrize(("module", "name"), ANSWERS)
def test_megatron_core_still_asks_cuda(module: str, name: str) -> None:
    """When this fails for the newest release, and the oldest supported one does not need it, delete the entry."""
    if name in megatron_cpu.CUDA:
        assert re.search(rf"torch\.cuda\.{name}\b", source(module))
    elif name in megatron_cpu.COLLECTIVES:
        assert re.search(rf"torch\.distributed\.{name}\(", source(module))
    else:  # a factory that is asked for a tensor on CUDA
        calls = re.findall(rf"torch\.{name}\((?:[^()]|\([^()]*\))*\)", source(module))
        assert any("cuda" in call or "pin_memory=True" in call for call in calls)


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in megatron_cpu.NAMES.items() for n in names])
def test_megatron_core_still_has_the_replaced_names(module: str, name: str) -> None:
    assert re.search(rf"\b{name}\(", source(module)) or (OLD and name == "te_general_gemm")


# Small uses of megatron-core, each of which fails when the CPU does not answer for the module beside it.


def _random() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 1)
    with tracker.fork("one"):
        torch.rand(1)


def _buffer() -> None:
    from megatron.core.utils import GlobalMemoryBuffer

    GlobalMemoryBuffer().get_tensor((2,), torch.float32, "name")


def _slices() -> None:
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    if OLD:
        from megatron.core import parallel_state

        parallel_state._CONTEXT_PARALLEL_GROUP = None
        parallel_state.get_context_parallel_world_size = lambda: 2
        parallel_state.get_context_parallel_rank = lambda: 0
    options = {} if OLD else {"cp_group": group}
    get_pos_emb_on_this_cp_rank(torch.zeros(8, 1, 1, 2), 0, **options)


def _angles() -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    options = {} if OLD else {"cp_group": SimpleNamespace(size=lambda: 1, rank=lambda: 0)}
    RotaryEmbedding(8, 1.0, use_cpu_initialization=True, **options)(4)


def _router() -> None:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    router_gating_linear(torch.ones(2, 4), torch.ones(3, 4), None, torch.float32)


def _splits() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    assert not torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True))
    assert token_dispatcher.torch.cuda.current_stream().record_event() is not None


def _tied() -> None:
    torch.ones(1).cuda()


USES: dict[str, Callable[[], None]] = {
    "tensor_parallel.random": _random,
    "utils": _buffer,
    "models.common.embeddings.rope_utils": _slices,
    "models.common.embeddings.rotary_pos_embedding": _angles,
    **({} if OLD else {"transformer.moe.moe_utils": _router}),  # 0.12 does not ask for TransformerEngine's product
    "transformer.moe.token_dispatcher": _splits,
    megatron_cpu.TENSOR_CUDA: _tied,
}


ERRORS = ("CUDA", "AssertionError", "RuntimeError", "AttributeError", "NameError")


def use_without(module: str) -> str:
    """Use megatron-core in a new process without one entry; return the kind of error."""
    code = (
        "from tests.accelerator import test_megatron_cpu as t; t.load_megatron_core(); "
        f"t.megatron_cpu.answer_for_cuda({module!r}); t.USES[{module!r}]()"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return outcome.stderr.strip().splitlines()[-1] if outcome.returncode else "no error"


@pytest.mark.slow
@pytest.mark.parametrize("module", USES)
def test_without_it_megatron_core_fails(module: str) -> None:
    assert any(word in use_without(module) for word in ERRORS)


def uses_with_all() -> list[str]:
    """Run every use with all entries; return what of torch has changed."""
    state.initialize(None, state.RankInfo.from_environment(), backend="gloo", timeout=None)
    before = {name: value for name, value in vars(torch).items() if callable(value)}
    cuda = dict(vars(torch.cuda))
    megatron_cpu.answer_for_cuda()
    for use in USES.values():
        if use is not _slices or not OLD:  # which changes megatron-core's state
            use()
    changed = [name for name, value in before.items() if getattr(torch, name) is not value]
    return changed + [name for name, value in cuda.items() if vars(torch.cuda)[name] is not value]


def test_with_all_of_them_it_works_and_torch_is_as_it_was(ranks1: RankPool) -> None:
    assert ranks1.run(uses_with_all) == [[]]


LENGTHS = [3, 0, 2, 4]


def shares(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows for all ranks, small integers that add up exactly and differ between the ranks that send them."""
    return torch.arange(2.0 * sum(LENGTHS)).view(-1, 2).to(dtype) * (rank + 1)


def gathered_and_scattered(dtype: torch.dtype, *plain: str) -> list[torch.Tensor]:
    """Gather and reduce-scatter shares of different lengths, forward and backward; leave the ``plain`` to gloo."""
    state.initialize(None, state.RankInfo.from_environment(), backend="gloo", timeout=None)
    load_megatron_core()
    megatron_cpu.answer_for_cuda()
    from megatron.core.tensor_parallel import mappings

    for name in plain:
        vars(mappings.torch.distributed)[name] = getattr(torch.distributed, name)
    group = torch.distributed.group.WORLD
    rank, lengths = group.rank(), LENGTHS[: group.size()]
    rows = shares(rank, dtype)[: sum(lengths)]
    try:
        mine = rows[: lengths[rank]].clone().requires_grad_()
        whole = mappings.gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=lengths)
        whole.backward(rows)
        all_rows = rows.clone().requires_grad_()
        part = mappings.reduce_scatter_to_sequence_parallel_region(all_rows, group=group, input_split_sizes=lengths)
        part.backward(rows[: lengths[rank]])
    finally:
        megatron_cpu.answer_for_cuda()
    return [whole.detach(), mine.grad, part.detach(), all_rows.grad]


def check_shares(answers: list[list[torch.Tensor]], dtype: torch.dtype) -> None:
    """Compare with the tensors of all ranks put together here."""
    lengths = LENGTHS[: len(answers)]
    rows = [shares(rank, dtype)[: sum(lengths)] for rank in range(len(answers))]
    whole = torch.cat([mine[:length] for mine, length in zip(rows, lengths, strict=True)])
    parts = sum(rows[1:], rows[0]).split(lengths)
    for answer, part in zip(answers, parts, strict=True):
        for found, right in zip(answer, [whole, part, part, whole], strict=True):
            assert found.dtype == dtype and torch.equal(found, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_different_lengths(ranks2: RankPool, dtype: torch.dtype) -> None:
    check_shares(ranks2.run(gathered_and_scattered, dtype), dtype)


@pytest.mark.slow
def test_shares_of_different_lengths_of_four_ranks(ranks4: RankPool) -> None:
    check_shares(ranks4.run(gathered_and_scattered, torch.float64), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", megatron_cpu.COLLECTIVES)
def test_gloo_alone_takes_no_shares_of_different_lengths(name: str) -> None:
    """When this fails for the oldest release of torch too, delete the collective."""
    if name == "reduce_scatter" and not version("torch").startswith("2.7."):
        pytest.skip("only torch 2.7 needs it")
    pool = RankPool(2)
    try:
        with pytest.raises(AssertionError, match=r"invalid tensor size|not support reduce_scatter"):
            pool.run(gathered_and_scattered, torch.float32, name, timeout=90.0)
    finally:
        pool.stop(kill=True)


@pytest.mark.ranks
def test_the_import_leaves_the_compiler_out() -> None:
    code = (
        "import sys, torch; from mindspeed_mm import accelerator; before = set(sys.modules); "
        "accelerator.prepare_megatron_layers(); new = set(sys.modules) - before; "
        "print([m for m in new if m.startswith('torch._inductor.compile_fx')])"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "[]"


def test_a_factory_keeps_what_is_not_about_cuda() -> None:
    made: Any = megatron_cpu._on_cpu(torch.zeros)
    assert made(2, device="cuda").device.type == "cpu"
    assert made(2, device=torch.device("cuda", 0)).device.type == "cpu"
    assert made(2, device="meta").is_meta
    assert made((2, 3), dtype=torch.int32).dtype == torch.int32
