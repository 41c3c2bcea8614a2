"""Files of a stranger that would run code when they are unpickled, wherever a folder is read: none of it runs."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from typer.testing import CliRunner

from mindspeed_mm.checkpoint import manifest, store
from mindspeed_mm.checkpoint.convert import dcp_to_hf, hf_to_dcp
from mindspeed_mm.checkpoint.hf_import import load_hf_weights
from mindspeed_mm.checkpoint.tensor_files import read_tensors
from mindspeed_mm.checkpoint.tensor_index import read_index
from mindspeed_mm.cli import app
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.checkpoint import hf, small


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.sentinel, "boom")


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    bomb = Bomb(tmp_path / "sentinel")
    pickle.loads(pickle.dumps(bomb))  # it works
    bomb.sentinel.unlink()
    return bomb


def load(folder: Path) -> None:
    model, optim = small.build(1)
    store.load(folder, model=model, optimizer=optim)


def command(*words: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        places = [str(folder)] * (2 if words[-1] == "diff" else 1)
        result = CliRunner().invoke(app, ["checkpoint", *words, *places])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code:
            raise UserError(result.output)

    return run


def convert(folder: Path) -> None:
    hf.write_folder(folder / "assets", "qwen3", False)
    dcp_to_hf(folder, folder / "out", folder / "assets")


READERS = {"load": load, **{name: command(name) for name in ("show", "verify", "diff")}, "convert": convert}


def plant(folder: Path, file: str, bomb: Bomb) -> None:
    """Put the bomb into one file of a checkpoint as its writer could: the manifest fits, or there is none."""
    small.save_after(folder, 1)
    path = folder / "iter_0000001"
    if file == ".metadata":
        index = read_index(path)
        index.planner_data["bomb"] = bomb
        (path / file).write_bytes(pickle.dumps(index))
    else:
        torch.save(bomb, path / file)
    (path / manifest.NAME).unlink()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("file", [".metadata", "state.pt", "rank_0.pt"])
def test_no_file_of_a_checkpoint_runs_code(file: str, reader: str, bomb: Bomb, tmp_path: Path) -> None:
    plant(tmp_path / "run", file, bomb)
    reads_it = {"load": True, "show": file == "state.pt"}.get(reader, file == ".metadata")
    try:
        READERS[reader](tmp_path / "run")
    except UserError as error:
        assert file in str(error) or not reads_it, error
        assert "pathlib.Path.write_text" in str(error) or file != ".metadata" or not reads_it, error
    else:
        assert not reads_it
    assert not bomb.sentinel.exists()


def test_an_object_where_a_tensor_belongs_is_not_unpickled(bomb: Bomb, tmp_path: Path) -> None:
    """DCP unpickles what its index calls bytes."""
    small.save_after(tmp_path, 1)
    path = tmp_path / "iter_0000001"
    weight = "model.frozen.weight"
    index = read_index(path)
    dcp.save({weight: bomb}, checkpoint_id=tmp_path / "bytes")
    theirs = read_index(tmp_path / "bytes")
    assert isinstance(index.state_dict_metadata[weight], TensorStorageMetadata)
    index.state_dict_metadata[weight] = theirs.state_dict_metadata[weight]
    index.storage_data.update(theirs.storage_data)
    (path / manifest.NAME).unlink()
    (path / ".metadata").write_bytes(pickle.dumps(index))
    (path / "__0_0.distcp").write_bytes((tmp_path / "bytes" / "__0_0.distcp").read_bytes())
    with pytest.raises(UserError):
        load(tmp_path)
    with pytest.raises(BaseException, match="pickled object where a tensor belongs"):
        read_tensors({weight: torch.empty(5, 5)}, path)
    assert not bomb.sentinel.exists()


def test_weights_in_a_pickle_are_refused_with_the_reason(bomb: Bomb, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    hf.write_folder(folder, "qwen3", False)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": bomb}, folder / "pytorch_model.bin")
    native = transformers.Qwen3ForCausalLM
    model = native._from_config(transformers.AutoConfig.from_pretrained(folder))
    for read in (lambda: load_hf_weights(model, folder), lambda: hf_to_dcp(folder, tmp_path / "dcp")):
        with pytest.raises(UserError, match=r"has pytorch_model\.bin, which is not read: a pickle may run code"):
            read()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which may run code"):
        TransformersModel(SimpleNamespace(init_from_hf_path=str(folder)))
    assert not bomb.sentinel.exists()


def test_an_index_of_any_dtype_and_layout_is_read(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn]
    tensors = {str(dtype): torch.zeros(2, dtype=dtype) for dtype in dtypes}
    tensors["nhwc"] = torch.zeros(1, 2, 3, 4).to(memory_format=torch.channels_last)
    dcp.save({"model": tensors, "args": json.loads("[1]")}, checkpoint_id=tmp_path)
    assert repr(read_index(tmp_path)) == repr(pickle.loads((tmp_path / ".metadata").read_bytes()))


def opened(path: Path, action: Callable[[], Any]) -> int:
    """Return how often a file was opened while ``action`` ran, as the interpreter itself tells."""
    count, counting = 0, True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if counting and event == "open" and str(arguments[0]) == str(path):
            count += 1

    sys.addaudithook(hook)
    action()
    counting = False
    return count


def test_the_index_is_read_once_for_all_weights(tmp_path: Path) -> None:
    hf.write_folder(tmp_path / "hf", "qwen3", False)
    path = hf_to_dcp(tmp_path / "hf", tmp_path / "dcp")
    # Once for its checksum, as every file, and once as the index.
    assert opened(path / ".metadata", lambda: dcp_to_hf(path, tmp_path / "out", tmp_path / "hf")) == 2
    native = transformers.Qwen3ForCausalLM
    assert not hf.differing(hf.read_back(tmp_path / "hf", native), hf.read_back(tmp_path / "out", native))
