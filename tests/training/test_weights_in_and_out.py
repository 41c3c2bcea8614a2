"""Weights pass through a run that trains nothing: in from an HF folder, out to an HF folder, not a bit changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.hf import differing, keys_on_disk, read_back, write_folder
from tests.models.tiny import tiny_config
from tests.ranks import RankPool
from tests.training.job import ROOT, Job, run_here

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "glm4v")
NO_DATA = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pretrain_transformers import forward_step, model_provider
from mindspeed_mm.training import pretrain
pretrain(lambda samples: (None, None, None), model_provider, None, forward_step)
"""


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_changes_no_bit(family: str, tie: bool, job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    """Read by ``from_pretrained`` before the model is sharded, then streamed into the shards."""
    import transformers

    source = tmp_path / "source"
    before = write_folder(source, family, tie)
    native = getattr(transformers, tiny_config(family).architectures[0])
    job.use_script(NO_DATA)
    job.model = {"init_from_hf_path": str(source)}
    job.yaml = {"sharding_size": "auto"}
    job.flags |= {"skip-train": True, "mm-data": None}
    for name, onto_meta in {"read": None, "streamed": True}.items():
        job.flags |= {"init-model-with-meta-device": onto_meta, "export-hf": tmp_path / name}
        for outcome in ranks2.run(run_here, job.command(), job.folder):
            assert outcome.code == 0, outcome.text
        assert not differing(before, read_back(tmp_path / name, native)), name
        assert keys_on_disk(tmp_path / name) == keys_on_disk(source), name
