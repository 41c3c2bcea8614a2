"""Settings of six systems: what differs is found, and how it is written does not matter."""

from __future__ import annotations

import dataclasses
import fractions
import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.arguments import parse_args, validate_args
from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.settings.config_diff import DIFFERENT, ONE_SIDE, judge, rows
from mindspeed_mm.precision.settings.config_keys import keys
from mindspeed_mm.precision.settings.config_side import Side, understand
from mindspeed_mm.precision.settings.config_sources import read_sources
from mindspeed_mm.training.checkpointing import plain_values
from tests.precision import golden
from tests.precision.command import run

_FLAGS = """--use-torch-fsdp2 --mm-data data.json --mm-model model.json --micro-batch-size 2 --global-batch-size 64
    --train-iters 2000 --lr 2e-5 --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.05 --adam-beta2 0.95
    --weight-decay 0.1 --clip-grad 1.0 --bf16 --calculate-per-token-loss --seed 1234 --seq-length 4096
    --num-layers 99 --hidden-dropout 0.7"""  # what has no effect on this road must not count


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Side:
    """Our own run: the manifest as a real command line fills it."""
    folder = tmp_path_factory.mktemp("ours")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(golden.CONFIG))
    args = parse_args(argv=_FLAGS.split())
    validate_args(args, world_size=8)
    configs = {
        "model": {"init_from_hf_path": str(folder / "model"), "loss_cfg": {"loss_type": "default"}},
        "data": {"dataloader_param": {"shuffle": False}},
        "fsdp2": {"param_dtype": "bf16", "reduce_dtype": "fp32"},
    }
    start = {"arguments": plain_values(vars(args)), "configs": configs, "world_size": 8}
    (folder / "run_manifest.json").write_text(json.dumps({"starts": [{"arguments": {"lr": 7}}, start]}))
    return understand(read_sources(str(folder)), {"hccl_deterministic": "1"})


def different(reference: Side, candidate: Side) -> set[str]:
    return {row.key.name for row in rows(reference, candidate) if row.outcome == DIFFERENT}


def candidate(system: str, folder: Path, files: dict[str, str]) -> Side:
    return understand(read_sources(golden.write(folder, files)), golden.GIVEN.get(system, {}))


def severe(names: set[str]) -> set[str]:
    return {name for name in names if keys()[name].severity != "note"}


@pytest.mark.parametrize("system", golden.FILES)
def test_the_same_run_in_another_system_has_no_differences(system: str, reference: Side, tmp_path: Path) -> None:
    side = candidate(system, tmp_path, golden.FILES[system])
    assert severe(different(reference, side)) == golden.ALWAYS.get(system, set())
    compared = [row for row in rows(reference, side) if row.outcome != ONE_SIDE]
    assert len(compared) >= 40, [row.key.name for row in compared]


@pytest.mark.parametrize("system", golden.FILES)
def test_every_difference_is_found_alone_and_among_others(system: str, reference: Side, tmp_path: Path) -> None:
    always = golden.ALWAYS.get(system, set())
    everything, expected = dict(golden.FILES[system]), set(always)
    for number, (changed, file, old, new) in enumerate(golden.CHANGES[system]):
        files = dict(golden.FILES[system])
        assert old in files[file], (file, old)
        files[file] = files[file].replace(old, new, 1)
        found = different(reference, candidate(system, tmp_path / str(number), files))
        assert severe(found) == severe(changed) | always, (changed, old)
        if old in everything[file] and len(changed) == 1 and changed.isdisjoint({"data_parallel_size"}):
            everything[file] = everything[file].replace(old, new, 1)
            expected |= changed
    assert different(reference, candidate(system, tmp_path / "all", everything)) >= expected


def test_there_are_enough_keys_and_no_name_means_two_things() -> None:
    compared = [key for key in keys().values() if not key.only_derives]
    assert len(compared) >= 120
    for system in ("hf", "config", "deepspeed", "torchtitan", "megatron"):
        seen: dict[str, str] = {}
        for key in keys().values():
            for name in key.names.get(system, ()):
                if name.text:
                    assert seen.setdefault(name.text, key.name) == key.name, (system, name.text)


def defaults_of_table(system: str) -> dict[str, Any]:
    from mindspeed_mm.precision.settings.config_values import read_value

    return {
        name.text: (key, not value if name.inverted else value)
        for key in keys().values()
        for name in key.names.get(system, ())
        if name.text and name.default is not None
        for value in [read_value(key, name.default)]
    }


def test_defaults_of_hugging_face_are_those_of_the_installed_version() -> None:
    import transformers

    from mindspeed_mm.precision.settings.config_values import equal, read_value

    fields = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
    checked = 0
    for name, (key, ours) in defaults_of_table("hf").items():
        if name in fields:
            theirs = fields[name]
            assert equal(key, read_value(key, getattr(theirs, "value", theirs)), ours), name
            checked += 1
    assert checked >= 18


def test_names_of_hugging_face_exist() -> None:
    """A name that no version has is a typing mistake; those of TRL, scripts and older versions are listed here."""
    import transformers

    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    elsewhere = {"warmup_ratio", "gradient_checkpointing", "max_seq_length", "max_length", "cutoff_len", "packing",
                 "template", "tokenizer_name", "tokenizer_name_or_path", "dataset_name", "dataset", "world_size",
                 "model_name_or_path", "nproc_per_node", "num_gpus", "nnodes", "num_nodes"}  # fmt: skip
    named = {name.text.partition(".")[0] for key in keys().values() for name in key.names.get("hf", ()) if name.text}
    assert named - elsewhere <= fields


def test_names_and_defaults_of_megatron_are_those_of_the_installed_version() -> None:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    from mindspeed_mm.precision.settings.config_values import equal, read_value

    checked = 0
    for cls in (OptimizerConfig, TransformerConfig):
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, (key, ours) in defaults_of_table("megatron").items():
            if name in fields:
                checked += 1
                assert equal(key, read_value(key, fields[name]), ours), (cls.__name__, name)
    assert checked >= 20


def test_what_a_config_leaves_out_is_the_default_of_its_class(tmp_path: Path) -> None:
    """The oracle is Hugging Face's own class."""
    import transformers

    config = transformers.LlamaConfig(rms_norm_eps=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    side = understand(read_sources(str(tmp_path)))
    assert side.value("num_layers") == config.num_hidden_layers
    assert side.value("num_query_groups") == config.num_attention_heads
    assert side.value("norm_eps") == transformers.LlamaConfig().rms_norm_eps


def test_arguments_that_trainer_saves_are_read_without_running_foreign_code(tmp_path: Path) -> None:
    import torch
    import transformers

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, lr_scheduler_type="cosine", warmup_steps=7, max_steps=50,
        weight_decay=0.1, bf16=False, use_cpu=True, report_to=[],
    )  # fmt: skip
    torch.save(args, tmp_path / "training_args.bin")
    side = understand(read_sources(str(tmp_path)))
    assert side.value("learning_rate") == 3e-4 and side.value("lr_schedule") == "cosine"
    assert side.value("warmup_steps") == 7 and side.value("decay_steps") == 50
    torch.save({"args": fractions.Fraction(1)}, tmp_path / "training_args.bin")
    with pytest.raises(UserError, match="to_json_string"):
        read_sources(str(tmp_path))


def test_a_log_of_megatron_is_read_by_its_table_of_arguments(tmp_path: Path, reference: Side) -> None:
    values = {"adam_beta2": 0.95, "lr": 2e-05, "num_layers": 24, "bf16": True, "swiglu": True, "hidden_size": 2048,
              "train_iters": 2000, "lr_warmup_iters": 0, "lr_warmup_fraction": 0.05, "lr_decay_iters": None,
              "lr_decay_style": "cosine", "ffn_hidden_size": 5504,
              "global_batch_size": 64, "micro_batch_size": 2, "clip_grad": 1.0, "weight_decay": 0.1}  # fmt: skip
    lines = [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in values.items()]
    (tmp_path / "train.log").write_text("\n".join(["------ arguments ------", *lines, "------ end ------"]))
    side = understand(read_sources(str(tmp_path / "train.log")))
    assert side.value("warmup_steps") == 100 and side.value("decay_steps") == 2000
    assert not severe(different(reference, side)) - {"loss_reduction"}


def test_contradictions_unknown_names_and_values_from_outside_are_told(tmp_path: Path) -> None:
    (tmp_path / "training_args.json").write_text(json.dumps({"learning_rate": 1e-5, "max_grad_norm": 1.0, "mine": 3}))
    (tmp_path / "ds_config.json").write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 1}}))
    notes = "\n".join(judge(Side(), understand(read_sources(str(tmp_path)))).notes)
    assert "clip_grad is 0 (deepspeed: gradient_clipping), but 1 by hf: max_grad_norm" in notes
    assert "no table has them (hf): mine" in notes
    (tmp_path / "run.sh").write_text("python x.py --lr $LR --micro-batch-size 1 --num-layers 2")
    notes = "\n".join(understand(read_sources(str(tmp_path / "run.sh"))).notes)
    assert "the values of lr come from outside" in notes


def test_effective_values_count_more_than_declared_ones() -> None:
    from mindspeed_mm.precision.settings.config_sources import Source

    side = understand([Source("ours", "a", {"adam_eps": 1e-8}), Source("effective", "a", {"eps": 1e-6})])
    assert side.value("eps") == 1e-6


@pytest.mark.parametrize(
    ("changes", "code"), [((), 0), (("--lr 1e-4",), 1), (("--num-workers 7",), 0), (("--seed 3",), 0)]
)
def test_exit_codes(changes: tuple[str, ...], code: int, tmp_path: Path) -> None:
    base = "--lr 1e-5 --micro-batch-size 1 --train-iters 5 --num-layers 2"
    (tmp_path / "a.sh").write_text(f"python a.py {base}")
    (tmp_path / "b.sh").write_text(f"python a.py {base} {' '.join(changes)}")
    assert run("config-diff", str(tmp_path / "a.sh"), str(tmp_path / "b.sh"), "--out", str(tmp_path / "o"))[0] == code
    assert json.loads((tmp_path / "o/verdict.json").read_text())["exit_code"] == code


def test_what_cannot_be_judged_is_exit_code_two(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("nothing here")
    (tmp_path / "b.sh").write_text("python a.py --lr 1e-5 --micro-batch-size 1")
    code, text = run("config-diff", str(tmp_path / "a.txt"), str(tmp_path / "b.sh"))
    assert code == 2 and "no settings of a known system" in text
    assert run("config-diff", str(tmp_path / "missing"), str(tmp_path / "b.sh"))[0] == 2
