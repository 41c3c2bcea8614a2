"""The groups of ranks that megatron-core is asked for."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mindspeed_mm.distributed import parallel
from mindspeed_mm.distributed.parallel import ParallelSizes
from tests.ranks import RankPool


def groups_of_the_same_ranks_are_one() -> None:
    from megatron.core import parallel_state as mpu

    for sizes in (ParallelSizes(), ParallelSizes(tensor=2), ParallelSizes(pipeline=2), ParallelSizes()):
        parallel.create_groups(sizes)
        groups = {
            "tensor": mpu.get_tensor_model_parallel_group(),
            "pipeline": mpu.get_pipeline_model_parallel_group(),
            "context": mpu.get_context_parallel_group(),
            "data": mpu.get_data_parallel_group(),
            "data and context": mpu.get_data_parallel_group(with_context_parallel=True),
            "model": mpu.get_model_parallel_group(),
            "experts": mpu.get_expert_model_parallel_group(),
            "data of experts": mpu.get_expert_data_parallel_group(),
        }
        members = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
        for name, group in groups.items():
            same = {other for other, ranks in members.items() if ranks == members[name]}
            assert {other for other in groups if groups[other] is group} == same
            total = torch.ones(())
            dist.all_reduce(total, group=group)
            assert total == len(members[name])
        for name, size in (("tensor", sizes.tensor), ("pipeline", sizes.pipeline), ("context", sizes.context)):
            assert len(members[name]) == size
        assert len(set(members.values())) == 2
    parallel.destroy_groups()


def test_groups_of_the_same_ranks_are_one(ranks2: RankPool) -> None:
    ranks2.run(groups_of_the_same_ranks_are_one)
