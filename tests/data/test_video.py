"""Videos where torchvision is missing: frames, pixels and prompt against Hugging Face's formulas written out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mindspeed_mm.data.collators import PackCollator, PaddingCollator
from mindspeed_mm.data.encoding import ConversationEncoder, EncodingOptions
from mindspeed_mm.data.model_inputs import ModelInputs
from mindspeed_mm.data.processors import load_processor
from mindspeed_mm.data.quarantine import BadSample
from mindspeed_mm.data.video import VideoLimits, load_video
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.data.tiny import save_tiny_processor
from tests.training.job import save_tiny_hf_folder

FRAMES, FPS, SIDE = 20, 10, (64, 48)  # width, height
VIDEO = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 4 * 8 * 8, "longest_edge": 4 * 64 * 64},
    "cap_pixels_per_frame": False,
}


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """Two seconds of a photo that moves, in few colours, which an animated picture keeps as they are."""
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("china.jpg")).resize((64 + FRAMES, 48)).quantize(64)
    frames = [photo.crop((n, 0, n + 64, 48)) for n in range(FRAMES)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=1000 // FPS)
    return str(tmp_path / "clip.gif")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_hf_folder("qwen3_vl", tmp_path / "model")
    (tmp_path / "model/video_preprocessor_config.json").write_text(json.dumps(VIDEO))
    template = tmp_path / "model/chat_template.jinja"
    mark = "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif part.type == 'image' %}"
    template.write_text(template.read_text().replace("{% if part.type == 'image' %}", mark))
    return tmp_path / "model"


def frames_of(clip: str, indices: list[int]) -> list[Image.Image]:
    found = []
    with Image.open(clip) as image:
        for index in indices:
            image.seek(index)
            found.append(image.convert("RGB"))
    return found


@pytest.mark.parametrize(("fps", "maxlen", "expected"), [(2.0, 128, 4), (5.0, 128, 10), (10.0, 6, 6), (0.1, 128, 4)])
def test_frames_are_those_of_the_published_formula(fps, maxlen, expected, clip, folder):
    processor = load_processor(folder).video_processor
    frames, metadata = load_video(clip, "row", processor, VideoLimits(fps=fps, maxlen=maxlen))
    # Qwen3-VL: int(frames / rate * fps), at least 4, at equal distances from the first to the last.
    indices = [round(n * (FRAMES - 1) / (expected - 1)) for n in range(expected)]
    assert [int(n) for n in metadata.frames_indices] == indices
    assert metadata.fps == pytest.approx(FPS) and metadata.total_num_frames == FRAMES
    assert np.array_equal(frames, np.stack([np.asarray(frame) for frame in frames_of(clip, indices)]))
    small, _ = load_video(clip, "row", processor, VideoLimits(max_pixels=32 * 24))
    assert small.shape == (4, 24, 32, 3)


def test_video_files_give_the_frames_that_went_in(clip, folder, tmp_path):
    av = pytest.importorskip("av")
    went_in = frames_of(clip, list(range(FRAMES)))
    lossless, mpeg4 = str(tmp_path / "clip.mkv"), str(tmp_path / "clip.mp4")
    for path, codec, pixels in ((lossless, "ffv1", "bgr0"), (mpeg4, "mpeg4", "yuv420p")):
        with av.open(path, "w") as container:
            stream = container.add_stream(codec, rate=FPS)
            stream.width, stream.height, stream.pix_fmt = *SIDE, pixels
            for frame in [*map(av.VideoFrame.from_image, went_in), None]:
                container.mux(stream.encode(frame))
    processor = load_processor(folder).video_processor
    frames, metadata = load_video(lossless, "row", processor, VideoLimits(fps=5.0))
    assert (metadata.total_num_frames, metadata.fps) == (FRAMES, FPS)
    assert np.array_equal(frames, np.stack([np.asarray(went_in[int(n)]) for n in metadata.frames_indices]))
    lossy, same = load_video(mpeg4, "row", processor, VideoLimits(fps=5.0))
    assert [int(n) for n in same.frames_indices] == [int(n) for n in metadata.frames_indices]
    assert np.abs(lossy.astype(int) - frames.astype(int)).mean() < 15


def test_a_row_with_a_video(clip, folder):
    """Judge: Pillow's bicubic resize, normalisation and patches by hand, the prompt with its time stamps by hand."""
    encoder = ConversationEncoder(EncodingOptions(str(folder), video=VideoLimits(fps=2.0)))
    turns = [{"role": "user", "content": "<video>What moves?"}, {"role": "assistant", "content": "A temple."}]
    sample = encoder.encode({"messages": turns, "videos": [clip]}, "row")
    indices = [0, 6, 13, 19]
    # 4 frames of 48 x 64 are 12288 pixels, at most 16384: they stay as they are.
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames_of(clip, indices)])
    pixels = ((pixels.permute(0, 3, 1, 2) / 255) - 0.5) / 0.5
    patches = pixels.view(2, 2, 3, 6, 2, 4, 8, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(2 * 12 * 16, -1)
    assert sample["video_grid_thw"].tolist() == [[2, 12, 16]]
    torch.testing.assert_close(sample["pixel_values_videos"], patches, rtol=0, atol=1e-6)
    pads = "<|video_pad|>" * (12 * 16 // 4)
    stamps = [f"<{(indices[n] + indices[n + 1]) / 2 / FPS:.1f} seconds>" for n in (0, 2)]
    expected = "".join(f"{stamp}<|vision_start|>{pads}<|vision_end|>" for stamp in stamps)
    text = encoder.tokenizer.decode(sample["input_ids"])
    assert expected in text and text.endswith("What moves?<|im_end|>\n<|im_start|>assistant\nA temple.<|im_end|>\n")
    assert encoder.tokenizer.decode(sample["labels"][sample["labels"] >= 0]) == "A temple.<|im_end|>"
    assert set(sample["mm_token_type_ids"].tolist()) == {0, 2}
    everything = ConversationEncoder(EncodingOptions(str(folder), train_on_prompt=True))
    labels = everything.encode({"messages": turns, "videos": [clip]}, "row")["labels"]
    assert "<|video_pad|>" not in everything.tokenizer.decode(labels[labels >= 0])


def test_frames_are_resized_as_pillow_does(clip, folder):
    processor = load_processor(folder).video_processor
    frames = np.stack([np.asarray(frame) for frame in frames_of(clip, [0, 1])])
    size = type("Size", (), {"height": 24, "width": 40})
    base = type(processor).__mro__[2]
    found = base.resize(processor, torch.from_numpy(frames).permute(0, 3, 1, 2)[None], size)
    expected = np.stack([np.asarray(Image.fromarray(f).resize((40, 24), Image.Resampling.BICUBIC)) for f in frames])
    difference = found[0].permute(0, 2, 3, 1).numpy().astype(int) - expected.astype(int)
    assert found.dtype == torch.uint8 and np.abs(difference).max() <= 1


def test_what_is_wrong_with_a_video(clip, folder, processor_folder, tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "broken.gif").write_bytes(Path(clip).read_bytes()[:200])
    encoder = ConversationEncoder(EncodingOptions(str(folder)))
    with pytest.raises(BadSample, match=r"row: video .*broken\.gif cannot be decoded: .*; replace the file"):
        encoder.encode({"messages": turns, "videos": [str(tmp_path / "broken.gif")]}, "row")
    without = ConversationEncoder(EncodingOptions(str(processor_folder("internvl"))))
    with pytest.raises(BadSample, match=r"has videos but the processor in .* takes none; install torchvision"):
        without.encode({"messages": turns, "videos": [clip]}, "row")
    with pytest.raises(BadSample, match=r"the row has audio, which is not available"):
        encoder.encode({"messages": turns, "audios": ["a.wav"]}, "row")
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"a row with a video needs .*mindspeed-mm\[video\]"):
        encoder.encode({"messages": turns, "videos": [str(tmp_path / "a.mp4")]}, "row")


def test_a_model_takes_a_batch_of_a_video_an_image_and_text(clip, folder, tmp_path):
    from transformers import AutoModelForImageTextToText

    encoder = ConversationEncoder(EncodingOptions(str(folder)))
    answer = {"role": "assistant", "content": "x"}
    frames_of(clip, [3])[0].save(tmp_path / "a.png")
    rows = [
        {"messages": [{"role": "user", "content": "<video>?"}, answer], "videos": [clip]},
        {"messages": [{"role": "user", "content": "<image>?"}, answer], "images": [str(tmp_path / "a.png")]},
        {"messages": [{"role": "user", "content": "?"}, answer]},
    ]
    samples = [encoder.encode(row, "row") for row in rows]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    whole = model(**PaddingCollator(0)(samples)).logits
    ours, packed = TransformersModel({"init_from_hf_path": str(folder)}), []
    ours.model.lm_head.register_forward_hook(lambda module, args, output: packed.append(output[0]))
    pack = PackCollator(512, 0, ModelInputs(folder))(samples)
    ours(**pack)
    for number, sample in enumerate(samples):
        alone = model(**PaddingCollator(0, pad_to_multiple_of=1)([sample])).logits[0]
        torch.testing.assert_close(whole[number, : len(alone)], alone, rtol=0, atol=1e-5)
        start, end = pack["cu_seqlens"][number : number + 2].tolist()
        torch.testing.assert_close(packed[0][start:end], alone, rtol=0, atol=1e-5)


def test_a_video_for_glm(clip, tmp_path):
    """Its formula takes floor(seconds * fps) frames; it marks each pair of them as an image, with its second."""
    save_tiny_processor("glm4v", tmp_path / "glm")
    options = {"size": {"shortest_edge": 4 * 8 * 8, "longest_edge": 4 * 64 * 64}}
    config = {**VIDEO, **options, "video_processor_type": "Glm4vVideoProcessor"}
    (tmp_path / "glm/video_preprocessor_config.json").write_text(json.dumps(config))
    template = tmp_path / "glm/chat_template.jinja"
    mark = "{% if part.type == 'video' %}<|begin_of_video|><|video|><|end_of_video|>{% elif part.type == 'image' %}"
    template.write_text(template.read_text().replace("{% if part.type == 'image' %}", mark))
    encoder = ConversationEncoder(EncodingOptions(str(tmp_path / "glm")))
    turns = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "x"}]
    sample = encoder.encode({"messages": turns, "videos": [clip]}, "row")
    assert sample["video_grid_thw"].tolist() == [[2, 12, 16]]
    pair = "<|begin_of_image|>" + "<|image|>" * 48 + "<|end_of_image|>"
    text = encoder.tokenizer.decode(sample["input_ids"])
    assert f"<|begin_of_video|>{pair}0{pair}1<|end_of_video|>?" in text
