"""Few micro-batches for the stages there are, against Hugging Face's model in one process.

With as many as stages, the first stages of the interleaved schedule are still warming up when the step is over. No two
micro-batches have one length, and the same batches are evaluated afterwards.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from tests.distributed.megatron_step import Layout, check, run
from tests.distributed.test_megatron_parity import STAGES
from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

FAMILY = "qwen3_vl"
TWO, FOUR = {"pipeline": 2, "virtual": 2}, {"pipeline": 4, "virtual": 2}
OVERLAP = {**STAGES, "overlap_p2p_comm": True, "batch_p2p_comm": False}
CASES: dict[str, tuple[int, Layout]] = {
    "vpp-2": (2, Layout(2, TWO, STAGES, quick=True)),
    "vpp-4": (4, Layout(2, TWO, STAGES, quick=True)),
    "vpp-6": (6, Layout(2, TWO, STAGES, quick=True)),
    "vpp-overlap-2": (2, Layout(2, TWO, OVERLAP, quick=True)),
    "vpp-overlap-4": (4, Layout(2, TWO, OVERLAP)),
    "vpp-overlap-6": (6, Layout(2, TWO, OVERLAP)),
    "pp-1": (1, Layout(2, {"pipeline": 2}, STAGES, quick=True)),
    "vpp-of-4-stages-4": (4, Layout(4, FOUR, STAGES)),
    "vpp-of-4-stages-8": (8, Layout(4, FOUR, STAGES)),
    "vpp-of-4-stages-overlap-4": (4, Layout(4, FOUR, OVERLAP)),
    "pp-of-4-stages-2": (2, Layout(4, {"pipeline": 4}, STAGES)),
}


def micro_batches(count: int) -> list[dict[str, Tensor]]:
    return [tiny.tiny_batch(FAMILY, [1], length=12 + 2 * index, seed=index) for index in range(count)]


@cache
def oracle(count: int, layers: int) -> tuple[float, dict[str, Tensor]]:
    """Return the mean of the micro-batches' losses, and its gradient."""
    total, gradients = 0.0, {}
    for batch in micro_batches(count):
        loss, _, found = vlm.oracle(FAMILY, batch, layers=layers)
        total += loss / count
        gradients = {name: gradients.get(name, 0) + value / count for name, value in found.items()}
    return total, gradients


def warm_up() -> None:
    """Import what a step needs, so that the time limit of a step is that of its messages."""
    import megatron.core.pipeline_parallel  # noqa: F401

    tiny.tiny_model(FAMILY)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name", [name if row.quick else pytest.param(name, marks=pytest.mark.slow) for name, (_, row) in CASES.items()]
)
def test_a_step_of_few_micro_batches_ends(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    count, layout = CASES[name]
    layers = 2 * layout.ranks
    folder = tiny.save_tiny(FAMILY, tmp_path, layers=layers)
    loss, gradients = oracle(count, layers)
    pool: RankPool = request.getfixturevalue(f"ranks{layout.ranks}")
    pool.run(warm_up)
    check(pool.run(run, str(folder), layout, micro_batches(count), "default", timeout=60.0), {"loss": loss}, gradients)
