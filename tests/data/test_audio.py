"""Rows with audio: samples of files, features, prompt, and the model's results for each row alone."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from mindspeed_mm.data.audio import load_audio
from mindspeed_mm.data.collators import PackCollator, PaddingCollator
from mindspeed_mm.data.encoding import ConversationEncoder, EncodingOptions
from mindspeed_mm.data.model_inputs import ModelInputs
from mindspeed_mm.data.quarantine import BadSample
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.training.job import save_tiny_hf_folder

av = pytest.importorskip("av")


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def save_wav(path: Path, channels: list[np.ndarray], rate: int = 16000) -> str:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.stack(channels, axis=1) * 32767).round().astype("<i2").tobytes())
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_hf_folder("qwen2_audio", tmp_path_factory.mktemp("qwen2_audio"))


def test_a_wav_of_the_models_rate_is_read_bit_for_bit(tmp_path):
    path = save_wav(tmp_path / "a.wav", [tone(0.5, 16000)])
    with wave.open(path) as file:
        expected = np.frombuffer(file.readframes(8000), "<i2").astype(np.float32) / 32768
    assert np.array_equal(load_audio(path, "row", 16000), expected)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_other_rates_and_channels_become_one_channel_of_the_models_rate(rate, tmp_path):
    path = save_wav(tmp_path / "a.wav", [tone(0.5, rate), tone(0.5, rate) * 0.5], rate)
    found, expected = load_audio(path, "row", 16000), tone(0.5, 16000) * 0.75
    assert found.dtype == np.float32 and abs(len(found) - 8000) <= 1
    middle = slice(400, 7600)  # a filter has nothing to go by at the ends
    assert np.abs(found[middle] - expected[middle]).max() < 0.005


def test_a_row_with_audio(folder, tmp_path):
    """Judge: Hugging Face's feature extractor on the samples; the number of tokens by hand."""
    sounds = [tone(0.4, 16000), tone(0.9, 16000, 1000)]
    paths = [save_wav(tmp_path / f"{n}.wav", [sound]) for n, sound in enumerate(sounds)]
    encoder = ConversationEncoder(EncodingOptions(str(folder)))
    question = {"role": "user", "content": "<audio>\nIs this higher than <audio>?"}
    turns = [question, {"role": "assistant", "content": "It is lower."}]
    sample = encoder.encode({"messages": turns, "audios": paths}, "row")
    # One frame for 10 ms, of which a convolution keeps every second and a pooling every second of those.
    first, second = ("<|audio_bos|>" + "<|AUDIO|>" * n + "<|audio_eos|>" for n in (10, 22))
    text = encoder.tokenizer.decode(sample["input_ids"])
    assert f"Audio: {first}\nIs this higher than Audio: {second}\n?<|im_end|>" in text
    assert encoder.tokenizer.decode(sample["labels"][sample["labels"] >= 0]) == "It is lower.<|im_end|>"
    assert sample["feature_attention_mask"].sum(-1).tolist() == [40, 90]
    hears = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    read = [load_audio(path, "row", 16000) for path in paths]
    expected = hears(read, sampling_rate=16000, return_tensors="pt", padding="max_length")["input_features"]
    torch.testing.assert_close(sample["input_features"], expected, rtol=0, atol=1e-5)
    everything = ConversationEncoder(EncodingOptions(str(folder), train_on_prompt=True))
    labels = everything.encode({"messages": turns, "audios": paths}, "row")["labels"]
    assert "<|AUDIO|>" not in everything.tokenizer.decode(labels[labels >= 0])


def test_a_row_as_long_as_its_features_are_wide(folder, tmp_path):
    """A feature mask of (1, 100) for 100 tokens is still the mask of one recording."""
    path = save_wav(tmp_path / "a.wav", [tone(0.4, 16000)])
    encoder = ConversationEncoder(EncodingOptions(str(folder), seq_length=100))
    turns = [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "la " * 200}]
    sample = encoder.encode({"messages": turns, "audios": [path]}, "row")
    assert len(sample["input_ids"]) == 100
    assert sample["feature_attention_mask"].shape == (1, 100) and sample["input_features"].shape == (1, 8, 100)
    whole = ConversationEncoder(EncodingOptions(str(folder)))
    short = [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "x"}]
    left = 100 - len(whole.encode({"messages": short, "audios": [path]}, "row")["input_ids"])
    short[1]["content"] = "x" * (left + 1)
    sample = whole.encode({"messages": short, "audios": [path]}, "row")
    assert len(sample["input_ids"]) == 100 and sample["feature_attention_mask"].shape == (1, 100)


def test_what_is_wrong_with_audio(folder, processor_folder, tmp_path, monkeypatch):
    def encode(path: str, encoder: ConversationEncoder) -> None:
        turns = [{"role": "user", "content": "<audio>?"}, {"role": "assistant", "content": "x"}]
        encoder.encode({"messages": turns, "audios": [path]}, "row")

    encoder = ConversationEncoder(EncodingOptions(str(folder)))
    (tmp_path / "broken.wav").write_bytes(b"RIFF\0\0\0\0WAVE")
    with pytest.raises(BadSample, match=r"row: audio .*broken\.wav cannot be decoded: .*; replace the file"):
        encode(str(tmp_path / "broken.wav"), encoder)
    with pytest.raises(BadSample, match=r"long\.wav is longer than the 1 seconds that the model hears; cut it"):
        encode(save_wav(tmp_path / "long.wav", [tone(1.1, 16000)]), encoder)
    with pytest.raises(BadSample, match=r"short\.wav has 0\.05 seconds, fewer than 0\.1"):
        encode(save_wav(tmp_path / "short.wav", [tone(0.05, 16000)]), encoder)
    with pytest.raises(BadSample, match=r"the row has audio but the model in .* takes none"):
        encode(str(tmp_path / "short.wav"), ConversationEncoder(EncodingOptions(str(processor_folder("qwen3_vl")))))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"a row with audio needs .*mindspeed-mm\[audio\]"):
        encode(str(tmp_path / "short.wav"), encoder)


def test_audio_and_text_have_the_logits_and_gradients_of_each_alone(folder, tmp_path):
    """Padded and packed, against Hugging Face's model on one sample after the other."""
    paths = [save_wav(tmp_path / f"{n}.wav", [tone(0.3 + n / 5, 16000, 300 * (n + 1))]) for n in range(3)]
    encoder = ConversationEncoder(EncodingOptions(str(folder)))
    answer = {"role": "assistant", "content": "x"}
    rows = [
        {"messages": [{"role": "user", "content": "<audio>?"}, answer], "audios": paths[:1]},
        {"messages": [{"role": "user", "content": "?"}, answer]},
        {"messages": [{"role": "user", "content": "<audio>and <audio>?"}, answer], "audios": paths[1:]},
    ]
    samples = [encoder.encode(row, "row") for row in rows]
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder).train()
    whole = theirs(**{k: v for k, v in PaddingCollator(0)(samples).items() if k != "labels"}).logits
    loss_cfg = {"loss_type": "per_token_loss"}
    ours, packed = TransformersModel({"init_from_hf_path": str(folder), "loss_cfg": loss_cfg}), []
    ours.model.lm_head.register_forward_hook(lambda module, args, output: packed.append(output[0]))
    pack = PackCollator(sum(len(sample["input_ids"]) for sample in samples) + 9, 0, ModelInputs(folder))(samples)
    ours(**pack)["loss"].backward()
    for number, sample in enumerate(samples):
        batch = PaddingCollator(0, pad_to_multiple_of=1)([sample])
        labels = batch.pop("labels")[0, 1:]
        alone = theirs(**batch).logits[0]
        F.cross_entropy(alone[:-1], labels, reduction="sum").backward()
        torch.testing.assert_close(whole[number, : len(alone)], alone, rtol=0, atol=1e-5)
        start, end = pack["cu_seqlens"][number : number + 2].tolist()
        torch.testing.assert_close(packed[0][start:end], alone, rtol=0, atol=1e-5)
    for (name, a), b in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * max(b.grad.abs().max(), 1), name
