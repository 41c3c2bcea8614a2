"""Recorded runs of the Megatron road, with and without a mistake in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mindspeed_mm.precision.records.record import Record
from tests.data.tiny import save_tiny_processor
from tests.precision.bench import train_here
from tests.precision.faults import wrap_forward
from tests.precision.runs import varied_rows
from tests.ranks import RankPool
from tests.training.job import _QWEN, ROOT, Job

TP = {"tensor_model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}
EP = {"expert_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
OTHER_ROAD = {"use_torch_fsdp2": None, "fsdp2_config_path": None, "ckpt_format": "torch_dist"}

Program = Callable[[], contextlib.AbstractContextManager[None]]


def save_model(folder: Path, family: str = "qwen3_vl", **text: Any) -> Path:
    """Write a tiny Qwen3-VL whose vocabulary ranks can share; ``text`` changes the configuration of its decoder."""
    import transformers

    from tests.models.tiny import tiny_config

    tokenizer = save_tiny_processor("qwen3_vl", folder).tokenizer
    config = tiny_config(family, tie=text.pop("tie_word_embeddings", False))
    for name, token in _QWEN.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    config.text_config.update({"vocab_size": 320, **text})
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.float32)
    with torch.no_grad():  # norms that do something
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def make_job(folder: Path, hf_folder: Path, family: str = "qwen3_vl") -> Job:
    """Return two recorded steps of eight samples of all kinds, in which everything is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder, hf_folder)
    job.rows = varied_rows(folder)
    job.model["model_id"] = family
    job.model["image_encoder"] = {"vision_encoder": {"freeze": False}}
    job.flags |= {"train-iters": 2, "global-batch-size": 8, "micro-batch-size": 2, "calculate-per-token-loss": True}
    job.flags |= {"precision-capture": "steps=0-1", "clip-grad": "0.5", "adam-eps": "1e-5", "seq-length": 160}
    return job


def on_megatron(pool: RankPool, job: Job, folder: Path, program: Program | None = None, **flags: Any) -> Record:
    """Run a job of the other road through ``pretrain_vlm.py`` and return its record.

    Args:
        pool: of the ranks.
        job: what it does.
        folder: of the record.
        program: a mistake, a function at the top level of a module.
        **flags: changes of the command line; None leaves a flag out.
    """
    before, script = dict(job.flags), job.script
    changes = {**OTHER_ROAD, **flags, "precision_dir": folder}
    job.flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    job.script = ROOT / "pretrain_vlm.py"
    try:
        outcomes = pool.run(train_here, job.command(), str(job.folder), None, program, timeout=240)
    finally:
        job.flags, job.script = before, script
    assert not any(code for code, _ in outcomes), "\n".join(text for _, text in outcomes)
    return Record.open(folder)


@contextlib.contextmanager
def built(change: Callable[[Any], None]) -> Iterator[None]:
    """Change every chunk of the model once it is built."""
    from mindspeed_mm.models.vlm_model import VLMModel

    original = VLMModel.__init__

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        change(self)

    with mock.patch.object(VLMModel, "__init__", build):
        yield


def layer(chunk: Any, number: int) -> Any:
    """Return the layer of this number in the whole model, None where another chunk has it."""
    return next((one for one in chunk.text_decoder.decoder.layers if one.layer_number == number + 1), None)


def norm_eps() -> contextlib.AbstractContextManager[None]:
    def change(chunk: Any) -> None:
        if (found := layer(chunk, 1)) is not None:
            found.input_layernorm.eps = 1e-4

    return built(change)


def rope_base() -> contextlib.AbstractContextManager[None]:
    def change(chunk: Any) -> None:
        rotary = chunk.text_decoder.rotary_pos_emb
        rotary.inv_freq = rotary.inv_freq**1.01

    return built(change)


def wrong_angles() -> contextlib.AbstractContextManager[None]:
    """The frequencies are right, and what is made of them is not; a shift of all would make no difference."""

    def change(chunk: Any) -> None:
        wrap_forward(chunk.text_decoder.rotary_pos_emb, lambda forward, positions: forward(2 * positions))

    return built(change)


def scaled_input_of_one_rank() -> contextlib.AbstractContextManager[None]:
    """The second tensor-parallel rank multiplies what goes into its part of the output projection."""

    def change(chunk: Any) -> None:
        from megatron.core import parallel_state

        found = layer(chunk, 0)
        if found is not None and parallel_state.get_tensor_model_parallel_rank() == 1:
            wrap_forward(found.self_attention.linear_proj, lambda forward, x: forward(x * 1.001))

    return built(change)


def norms_left_alone() -> contextlib.AbstractContextManager[None]:
    """The gradients of one norm are not added up over the ranks that share the sequence."""

    def change(chunk: Any) -> None:
        if (found := layer(chunk, 1)) is not None:
            found.input_layernorm.weight.sequence_parallel = False

    return built(change)


@contextlib.contextmanager
def scaled_loss() -> Iterator[None]:
    from mindspeed_mm.models.vlm_model import VLMModel

    original = VLMModel._with_loss

    def with_loss(self: Any, *args: Any) -> Any:
        output = original(self, *args)
        output["loss_dict"]["loss"] = output["loss_dict"]["loss"] * 1.001
        return output

    with mock.patch.object(VLMModel, "_with_loss", with_loss):
        yield


@contextlib.contextmanager
def another_weight() -> Iterator[None]:
    """A row of a fused weight is another one than the folder says: the first of the keys in the second layer."""
    from mindspeed_mm.training.megatron_checkpointing import MegatronCheckpointer

    original = MegatronCheckpointer.read_hf

    def read(self: Any, folder: str) -> list[str]:
        warnings = original(self, folder)
        for chunk in self.engine.module:
            if (found := layer(chunk.module, 1)) is not None:
                attention, weight = found.self_attention, found.self_attention.linear_qkv.weight
                queries = attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition
                with torch.no_grad():
                    weight[queries * attention.hidden_size_per_attention_head] += 0.01
        self.engine.mains.adopt()
        return warnings

    with mock.patch.object(MegatronCheckpointer, "read_hf", read):
        yield
