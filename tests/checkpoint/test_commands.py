"""``mindspeed-mm checkpoint``, as a user calls it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from mindspeed_mm.checkpoint import store
from mindspeed_mm.checkpoint.publish import TRACKER
from mindspeed_mm.checkpoint.tensor_files import TensorReader, write_tensors
from mindspeed_mm.cli import app
from mindspeed_mm.errors import UserError
from tests.checkpoint import small


def run(*words: object) -> tuple[int, str]:
    """Return the exit code of ``mindspeed-mm checkpoint <words>`` and what it printed; `UserError` passes."""
    result = CliRunner().invoke(app, ["checkpoint", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def save_runs(folder: Path, losses: dict[int, float | None]) -> None:
    model, optim = small.build(0)
    for step, loss in losses.items():
        small.train(model, optim, range(1))
        snapshot = store.take_snapshot(step, model=model, optimizer=optim, extra={"args": {"lr": 0.1}}, rank_state={})
        store.write_snapshot(folder, snapshot, validation_loss=loss)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("iter_*"))


def test_list_and_show(tmp_path: Path) -> None:
    save_runs(tmp_path, {1: None, 2: 0.25})
    (tmp_path / "iter_0000001" / "state.pt").unlink()
    code, text = run("list", tmp_path)
    rows = {line.split()[0]: line for line in text.splitlines() if "iter_" in line}
    assert code == 0 and "DAMAGED" in rows["iter_0000001"] and "0.25" in rows["iter_0000002"]
    assert "newest" in rows["iter_0000002"] and "newest" not in rows["iter_0000001"]
    code, text = run("show", tmp_path)
    assert (
        code == 0
        and re.search(r"args\.lr +0\.1", text)
        and re.search(rf"torch +{re.escape(torch.__version__.split('+')[0])}", text)
    )
    assert re.search(r"model\.embed\.weight +\(7, 5\) +float32 +[0-9a-f]{16}", text)
    with pytest.raises(UserError, match="no such folder"):
        run("list", tmp_path / "nowhere")


def test_a_folder_may_hold_odd_things_and_have_an_odd_name(tmp_path: Path) -> None:
    folder = tmp_path / "run [v2] [/a] :smile: ü"
    save_runs(folder, {1: None})
    (folder / "iter_0000001" / "gone").symlink_to(tmp_path / "nowhere")
    (folder / "iter_²").mkdir()
    (folder / "iter_²" / ".metadata").touch()
    assert run("list", folder)[0] == 0
    code, text = run("show", folder)
    assert code == 0 and f"{folder.name}/iter_0000001" in " ".join(text.split())
    assert run("verify", folder) == (0, f"{folder}/iter_0000001: not in the manifest: gone\n")
    for content in (b"\xb1", "²".encode(), b""):
        (folder / TRACKER).write_bytes(content)
        code, text = run("verify", folder)
        assert code == 1 and "is neither an iteration nor 'release'; pass --ckpt-step" in text
        assert run("list", folder)[0] == 0


def test_verify_names_the_file(tmp_path: Path) -> None:
    save_runs(tmp_path, {1: None, 2: None})
    assert run("verify", tmp_path)[0] == 0
    file = tmp_path / "iter_0000001" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (tmp_path / "iter_0000002" / "notes.txt").write_text("mine")
    code, text = run("verify", tmp_path)
    assert code == 1 and "iter_0000001: DAMAGED\n  __0_0.distcp is not what was saved" in text
    assert "iter_0000002: not in the manifest: notes.txt" in text
    assert run("verify", tmp_path / "iter_0000002")[0] == 0
    (tmp_path / TRACKER).write_text("7")
    (tmp_path / "iter_0000001" / "manifest.json").unlink()
    code, text = run("verify", tmp_path)
    assert code == 1 and "names iter_0000007" in text and "cannot be verified: no manifest" in text


def test_diff_says_which_tensors_and_how_far(tmp_path: Path) -> None:
    small.save_after(tmp_path / "a", 1)
    small.save_after(tmp_path / "b", 1)
    a, b = tmp_path / "a", tmp_path / "b"
    assert run("diff", a, b) == (0, "28 of 28 tensors are equal\n")

    model, optim = small.build(0)
    small.train(model, optim, range(1))
    with torch.no_grad():
        model.embed.weight[3, 2] += 0.5
        norm = model.embed.weight.double().norm()
    del model.unused
    store.save(b, 1, model=model, optimizer=None, extra={}, rank_state={})
    code, text = run("diff", a, b, "--weights-only")
    assert code == 1 and "only in" in next(line for line in text.splitlines() if "model.unused" in line)
    line = next(line for line in text.splitlines() if "model.embed.weight" in line)
    max_abs, relative = map(float, line.split()[1:3])
    assert max_abs == pytest.approx(0.5, rel=1e-3)
    before = small.load_into_fresh(a)[0]["embed.weight"].double().norm()
    assert relative == pytest.approx(0.5 / before.item(), rel=1e-3) and norm != before
    assert text.endswith("8 of 10 tensors are equal\n")
    assert "optimizer.state" in run("diff", a, b)[1] and "optimizer.state" not in text


def test_diff_does_not_read_tensors_whose_digests_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_runs(tmp_path, {1: None, 2: None})
    read: list[str] = []
    monkeypatch.setattr(TensorReader, "read", lambda self, tensors: read.extend(tensors))
    assert run("diff", tmp_path / "iter_0000001", tmp_path / "iter_0000001")[0] == 0
    assert not read
    run("diff", tmp_path / "iter_0000001", tmp_path / "iter_0000002")
    assert "model.embed.weight" in read and "model.frozen.weight" not in read


def test_diff_of_what_cannot_be_read(tmp_path: Path) -> None:
    save_runs(tmp_path, {1: None, 2: None})
    (tmp_path / "iter_0000002" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read .*iter_0000002: rank 0: "):
        run("diff", tmp_path / "iter_0000001", tmp_path / "iter_0000002")


def test_diff_maps_names_of_hugging_face_folders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=11,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "hf")
    weights = {k: v.detach() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for prefix in ("model.", "model.model."):
        folder = tmp_path / prefix
        write_tensors({prefix + name: tensor for name, tensor in weights.items()}, folder)
        code, text = run("diff", tmp_path / "hf", folder)
        assert (code, text) == (0, f"{len(weights)} of {len(weights)} tensors are equal\n")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        other.model.norm.weight += 0.25
    other.save_pretrained(tmp_path / "other")
    code, text = run("diff", tmp_path / "other", folder)
    assert code == 1 and "model.model.model.norm.weight" in text and "2.500e-01" in text
    code, text = run("diff", tmp_path / "hf", tmp_path / "other")
    assert code == 1 and " model.norm.weight" in text and f"{len(weights) - 1} of {len(weights)}" in text
    with pytest.raises(UserError, match="no tensor name in common"):
        dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "foreign")
        run("diff", tmp_path / "foreign", tmp_path / "hf")


def test_prune_keeps_what_is_asked_for_and_the_last_good_one(tmp_path: Path) -> None:
    save_runs(tmp_path, {1: 0.5, 2: 0.1, 3: None, 4: 0.7, 5: 0.6, 6: 0.9})
    before = names(tmp_path)
    with pytest.raises(UserError, match="--keep-last"):
        run("prune", tmp_path)
    code, text = run("prune", tmp_path, "--keep-last", 2, "--keep-every", 4, "--keep-best", 1, "--dry-run")
    assert code == 0 and text.count("would be deleted") == 2 and names(tmp_path) == before
    run("prune", tmp_path, "--keep-last", 2, "--keep-every", 4, "--keep-best", 1)
    assert names(tmp_path) == [f"iter_000000{n}" for n in (2, 4, 5, 6)]

    for step in (5, 6):  # the only ones that stay by the rule are damaged
        (tmp_path / f"iter_000000{step}" / "state.pt").write_bytes(b"")
    (tmp_path / TRACKER).write_text("5")
    code, text = run("prune", tmp_path, "--keep-last", 1)
    assert names(tmp_path) == [f"iter_000000{n}" for n in (4, 5, 6)]
    assert "the newest good one" in text and "the tracker names it" in text
