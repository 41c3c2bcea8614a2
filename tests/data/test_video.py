"""Videos where torchvision is missing: frames, pixels and prompt against Hugging Face's formulas written out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

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


QWEN_MARK = "<|vision_start|><|video_pad|><|vision_end|>"


def take_videos(folder: Path, config: dict[str, Any], mark: str) -> Path:
    (folder / "video_preprocessor_config.json").write_text(json.dumps(config))
    template = folder / "chat_template.jinja"
    marks = "{% if part.type == 'video' %}" + mark + "{% elif part.type == 'image' %}"
    template.write_text(template.read_text().replace("{% if part.type == 'image' %}", marks))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return take_videos(save_tiny_hf_folder("qwen3_vl", tmp_path / "model"), VIDEO, QWEN_MARK)


@pytest.fixture
def qwen2_5(tmp_path: Path) -> Path:
    size = {"shortest_edge": 8 * 8, "longest_edge": 64 * 64}
    config = {**VIDEO, "video_processor_type": "Qwen2VLVideoProcessor", "size": size}
    return take_videos(save_tiny_hf_folder("qwen2_5_vl", tmp_path / "qwen2_5"), config, QWEN_MARK)


@pytest.fixture
def internvl(tmp_path: Path) -> Path:
    config = {"video_processor_type": "InternVLVideoProcessor", "size": {"height": 16, "width": 16}}
    return take_videos(save_tiny_hf_folder("internvl", tmp_path / "internvl"), config, "{{ '<video>\\n' }}")


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


def test_tokens_of_a_video_are_counted_without_decoding_it(clip, folder, monkeypatch):
    picture = str(Path(clip).with_suffix(".png"))
    frames_of(clip, [0])[0].save(picture)
    turns = [{"role": "user", "content": "<video>What moves?<image>"}, {"role": "assistant", "content": "A temple."}]
    row = {"messages": turns, "videos": [clip], "images": [picture]}
    for limits in (VideoLimits(), VideoLimits(fps=5.0, maxlen=6), VideoLimits(max_pixels=32 * 24)):
        encoder = ConversationEncoder(EncodingOptions(str(folder), video=limits))
        expected = len(encoder.encode(row, "row")["input_ids"])
        with monkeypatch.context() as patch:
            patch.setattr("mindspeed_mm.data.video._Pictures.frames", None)
            assert encoder.count_tokens(row, "row") == expected


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
    with pytest.raises(BadSample, match=r"the row has audio but the model in .* takes none"):
        encoder.encode({"messages": turns, "audios": ["a.wav"]}, "row")
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"a row with a video needs .*mindspeed-mm\[video\]"):
        encoder.encode({"messages": turns, "videos": [str(tmp_path / "a.mp4")]}, "row")


def pixels_of(frames: list[Image.Image], processor: Any, **options: Any) -> Tensor:
    """Return what Hugging Face's image processor, which needs Pillow only, makes of each frame."""
    return torch.cat([processor(frame, return_tensors="pt", **options)["pixel_values"] for frame in frames])


# A frame of 64 x 48 as it is, made smaller and made larger.
@pytest.mark.parametrize(
    ("least", "most", "height", "width"), [(64, 4096, 48, 64), (64, 999, 24, 32), (4096, 9999, 56, 80)]
)
def test_a_video_for_qwen2_5(least, most, height, width, clip, qwen2_5):
    """Judge: the family's own Pillow image processor on each frame; indices, seconds and positions by hand."""
    config = json.loads((qwen2_5 / "video_preprocessor_config.json").read_text())
    config["size"] = {"shortest_edge": least, "longest_edge": most}
    (qwen2_5 / "video_preprocessor_config.json").write_text(json.dumps(config))
    encoder = ConversationEncoder(EncodingOptions(str(qwen2_5), video=VideoLimits(fps=3.0)))
    turns = [{"role": "user", "content": "<video>What moves?"}, {"role": "assistant", "content": "A temple."}]
    sample = encoder.encode({"messages": turns, "videos": [clip]}, "row")
    indices = [0, 3, 6, 10, 13, 16]  # 6 frames: floor(20 / 6 * n)
    rows, columns = height // 4, width // 4
    assert sample["video_grid_thw"].tolist() == [[3, rows, columns]]
    image_processor = transformers.Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most, patch_size=4)
    single = pixels_of(frames_of(clip, indices), image_processor).view(6, rows * columns, 3, 2, 16)[:, :, :, 0]
    expected = torch.stack([single[0::2], single[1::2]], dim=3).reshape(3 * rows * columns, -1)  # frames in pairs
    resized = (height, width) != (48, 64)  # in bytes: by torch and Pillow alike, but for the last bit
    found = sample["pixel_values_videos"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255 / 0.26 if resized else 1e-5)
    pads = rows * columns // 4 * 3
    expected_text = f"<|vision_start|>{'<|video_pad|>' * pads}<|vision_end|>What moves?<|im_end|>"
    assert expected_text in encoder.tokenizer.decode(sample["input_ids"])
    # 6 of the 20 frames at 10 a second are 3 a second, so each pair is 2/3 of a second.
    assert sample["second_per_grid_ts"].tolist() == pytest.approx([2 / 3])
    time, down, right = ModelInputs(qwen2_5).positions(sample)[:, sample["mm_token_type_ids"] == 2]
    first, each = int(time[0]), pads // 3
    assert (time - first).tolist() == [int(4 * 2 / 3 * n) for n in range(3) for _ in range(each)]  # 4 ids a second
    assert (down - first).tolist() == [n // (columns // 2) for n in range(each)] * 3
    assert (right - first).tolist() == [n % (columns // 2) for n in range(each)] * 3
    question, _ = encoder.encode_question({"messages": turns, "videos": [clip]}, "row")
    assert question["second_per_grid_ts"].shape == (1,)


def test_a_video_beside_an_image_for_internvl(clip, internvl, tmp_path):
    """Judge: the family's own Pillow image processor on each frame; indices and prompt by hand."""
    picture = frames_of(clip, [9])[0].crop((0, 0, 40, 30))
    picture.save(tmp_path / "a.png")
    encoder = ConversationEncoder(EncodingOptions(str(internvl)))
    question = {"role": "user", "content": "<video>\nWhat moves past <image>?"}
    turns = [question, {"role": "assistant", "content": "A temple."}]
    row = {"messages": turns, "videos": [clip], "images": [str(tmp_path / "a.png")]}
    sample = encoder.encode(row, "row")
    indices = [2, 7, 12, 17]  # 2 frames a second, each from the middle of its half second
    image_processor = encoder.processor.image_processor
    frames = pixels_of([*frames_of(clip, indices), picture], image_processor, crop_to_patches=False)
    torch.testing.assert_close(sample["pixel_values"], frames, rtol=0, atol=1.01 / 255 / 0.26)
    tile = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    film = "\n".join(f"Frame{n + 1}: {tile}" for n in range(4))
    text = encoder.tokenizer.decode(sample["input_ids"])
    assert f"{film}\nWhat moves past {tile}\n?<|im_end|>" in text
    assert encoder.tokenizer.decode(sample["labels"][sample["labels"] >= 0]) == "A temple.<|im_end|>"
    short = ConversationEncoder(EncodingOptions(str(internvl), video=VideoLimits(fps=0.1)))
    with pytest.raises(
        BadSample, match=r"clip\.gif of 2\.00 seconds is too short for 0\.1 frames .* raise .*video_fps"
    ):
        short.encode(row, "row")
    every = ConversationEncoder(EncodingOptions(str(internvl), video=VideoLimits(fps=99.0)))
    assert len(every.encode(row, "row")["pixel_values"]) == FRAMES + 1


@pytest.mark.parametrize("family", ["folder", "qwen2_5", "internvl"])
def test_videos_images_and_text_have_the_logits_and_gradients_of_each_alone(family, clip, tmp_path, request):
    """Padded and packed, against Hugging Face's model on one sample after the other."""
    folder = request.getfixturevalue(family)
    encoder = ConversationEncoder(EncodingOptions(str(folder)))
    answer = {"role": "assistant", "content": "x"}
    frames_of(clip, [3])[0].save(tmp_path / "a.png")
    rows = [
        {"messages": [{"role": "user", "content": "<video>?"}, answer], "videos": [clip]},
        {"messages": [{"role": "user", "content": "<image>?"}, answer], "images": [str(tmp_path / "a.png")]},
        {"messages": [{"role": "user", "content": "?"}, answer]},
        {"messages": [{"role": "user", "content": "<video>and <video>?"}, answer], "videos": [clip, clip]},
    ]
    samples = [encoder.encode(row, "row") for row in rows]
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).train()
    whole = model(**PaddingCollator(0)(samples)).logits
    loss_cfg = {"loss_type": "per_token_loss"}
    ours, packed = TransformersModel({"init_from_hf_path": str(folder), "loss_cfg": loss_cfg}), []
    ours.model.lm_head.register_forward_hook(lambda module, args, output: packed.append(output[0]))
    capacity = sum(len(sample["input_ids"]) for sample in samples) + 9
    pack = PackCollator(capacity, 0, ModelInputs(folder))(samples)
    ours(**pack)["loss"].backward()
    for number, sample in enumerate(samples):
        batch = PaddingCollator(0, pad_to_multiple_of=1)([sample])
        labels = batch.pop("labels")[0, 1:]
        alone = model(**batch).logits[0]
        F.cross_entropy(alone[:-1], labels, reduction="sum").backward()
        torch.testing.assert_close(whole[number, : len(alone)], alone, rtol=0, atol=1e-5)
        start, end = pack["cu_seqlens"][number : number + 2].tolist()
        torch.testing.assert_close(packed[0][start:end], alone, rtol=0, atol=1e-5)
    for (name, a), b in zip(ours.model.named_parameters(), model.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * max(b.grad.abs().max(), 1), name


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
