from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mindspeed_mm.data.encoding import IGNORE_INDEX, ConversationEncoder, EncodingOptions
from mindspeed_mm.errors import UserError
from tests.data.tiny import save_tiny_processor

VISION = ["qwen3_vl", "qwen2_5_vl", "glm4v", "internvl"]


@pytest.fixture
def encoder(processor_folder):
    def make(family: str, **options) -> ConversationEncoder:
        return ConversationEncoder(EncodingOptions(str(processor_folder(family)), **options))

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    from sklearn.datasets import load_sample_image

    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for name, size in (("china.jpg", (64, 40)), ("flower.jpg", (36, 60))):
        Image.fromarray(load_sample_image(name)).resize(size).save(folder / name)
        paths.append(str(folder / name))
    return paths


def conversation(images: bool = True) -> list[dict[str, str]]:
    mark = "<image>" if images else ""
    return [
        {"role": "system", "content": "You look at pictures."},
        {"role": "user", "content": f"{mark}\nWhat is here, and {mark} here?"},
        {"role": "assistant", "content": "A temple.\nAnd a flower <3"},
        {"role": "user", "content": "Which colour?"},
        {"role": "assistant", "content": " red"},
    ]


def row(messages, images=()) -> dict:
    return {"messages": messages, "images": list(images)}


def targets(sample, encoder) -> list[str]:
    """The text of every unbroken run of labels."""
    ids = sample["labels"].tolist()
    runs, run = [], []
    for token in [*ids, IGNORE_INDEX]:
        if token != IGNORE_INDEX:
            run.append(token)
        elif run:
            runs.append(encoder.tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("family", [*VISION, "text"])
def test_labels_equal_the_generation_mask_of_the_template(family, encoder, pictures):
    """Judge: the mask transformers derives from the {% generation %} marks of the tiny templates."""
    enc = encoder(family)
    messages = conversation(images=family != "text")
    pictures = pictures if family != "text" else []
    sample = enc.encode(row(messages, pictures), "row")

    loaded = iter([Image.open(path).convert("RGB") for path in pictures])
    parts = []
    for message in messages:
        content = []
        for piece in re.split("(<image>)", message["content"]):
            if piece == "<image>":
                content.append({"type": "image", "image": next(loaded)})
            elif piece:
                after_image = family == "internvl" and content and piece.startswith("\n")
                content.append({"type": "text", "text": piece[1:] if after_image else piece})
        parts.append({"role": message["role"], "content": content})
    options = {"crop_to_patches": False} if family == "internvl" else {}
    kwargs = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    if family == "text":
        judge = enc.processor.apply_chat_template([messages], **kwargs)
    else:
        judge = enc.processor.apply_chat_template([parts], processor_kwargs=options, return_tensors="pt", **kwargs)
    ids = torch.as_tensor(judge["input_ids"])[0]
    mask = torch.as_tensor(judge["assistant_masks"])[0].bool()
    length = len(ids)
    assert torch.equal(sample["input_ids"][:length], ids)
    assert torch.equal(sample["labels"][:length] != IGNORE_INDEX, mask)
    assert torch.equal(sample["labels"][:length][mask], ids[mask])
    for key in judge.keys() - {"input_ids", "assistant_masks", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(sample[key], judge[key]), key
    # GLM's template leaves the last turn open: we close it, so that the model learns to stop.
    closing = sample["labels"][length:].tolist()
    assert closing == ([enc.tokenizer.eos_token_id] if family == "glm4v" else [IGNORE_INDEX] * len(closing))


def test_target_text(encoder, pictures):
    enc = encoder("qwen3_vl")
    sample = enc.encode(row(conversation(), pictures), "row")
    assert targets(sample, enc) == ["A temple.\nAnd a flower <3<|im_end|>", " red<|im_end|>"]
    enc = encoder("glm4v")
    assert targets(enc.encode(row(conversation(), pictures), "row"), enc) == [
        "A temple.\nAnd a flower <3",
        " red<|endoftext|>",
    ]


def test_mask_history_keeps_the_last_turn_only(encoder, pictures):
    enc = encoder("internvl", mask_history=True)
    assert targets(enc.encode(row(conversation(), pictures), "row"), enc) == [" red<|im_end|>"]


def test_train_on_prompt_learns_all_text_and_no_image_token(encoder, pictures):
    enc = encoder("qwen3_vl", train_on_prompt=True)
    sample = enc.encode(row(conversation(), pictures), "row")
    image = sample["input_ids"] == enc.processor.image_token_id
    assert torch.equal(sample["labels"] == IGNORE_INDEX, image)
    assert int(image.sum()) == int(sample["image_grid_thw"].prod(-1).sum()) // 4
    assert torch.equal(sample["mm_token_type_ids"].bool(), image)


def test_every_image_token_of_internvl_is_kept_from_the_labels(encoder, pictures):
    enc = encoder("internvl", train_on_prompt=True)
    sample = enc.encode(row(conversation(), pictures), "row")
    image = torch.isin(sample["input_ids"], torch.tensor(enc.processor.image_token_ids))
    assert torch.equal(sample["labels"] == IGNORE_INDEX, image) and int(image.sum()) == 2 * (1 + 4 + 1)


def test_image_limits(encoder, pictures):
    def size(**limits: int) -> tuple[int, int]:
        """Height and width in pixels, after the processor has rounded them to multiples of 8."""
        sample = encoder("qwen3_vl", **limits).encode(row(conversation(), pictures), "row")
        return tuple(4 * sample["image_grid_thw"][0, 1:])

    assert size() == (40, 64)
    assert size(image_max_pixels=16 * 26, image_min_pixels=1) == (16, 24)
    assert size(image_min_pixels=48 * 77, image_max_pixels=10**6) == (48, 80)


def test_a_picture_of_16_bits_is_not_cut_off_at_8(encoder, tmp_path):
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(shades + 255).save(tmp_path / name)
    Image.fromarray((shades >> 8).astype(np.uint8)).save(tmp_path / "plain.png")
    one, other, plain = (
        encoder("qwen3_vl").encode(row(conversation(), [str(tmp_path / name)] * 2), "row")["pixel_values"]
        for name in ("deep.png", "deep.tif", "plain.png")
    )
    assert torch.equal(one, plain) and torch.equal(other, plain)


@pytest.mark.parametrize("family", [*VISION, "text"])
def test_tokens_are_counted_without_decoding_a_picture(family, encoder, pictures, tmp_path, monkeypatch):
    for size in ((7, 90), (200, 31)):
        Image.new("RGB", size).save(tmp_path / f"{size[0]}.png")
    odd = [str(tmp_path / "7.png"), str(tmp_path / "200.png")]
    document = [{"role": "document", "content": "A page." if family == "text" else "A <image> page. <image>"}]
    rows = [row(conversation(images=False)), row(document, [] if family == "text" else odd)]
    if family != "text":
        rows += [row(conversation(), pictures), row(conversation(), odd), row(conversation(), [pictures[0]] * 2)]
        for width, height in np.random.default_rng(0).integers(4, 150, (20, 2)).tolist():
            Image.new("RGB", (width, height)).save(tmp_path / f"{width}x{height}.png")
            rows.append(row(conversation(), [str(tmp_path / f"{width}x{height}.png"), pictures[0]]))
    for options in ({}, {"crop_to_patches": True}, {"image_max_pixels": 600, "image_min_pixels": 500}):
        enc = encoder(family, **options)
        expected = [len(enc.encode(one, "row")["input_ids"]) for one in rows]
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", None)  # decodes
            assert [enc.count_tokens(one, "row") for one in rows] == expected
    longest = rows[-1]
    enc = encoder(family, seq_length=len(encoder(family).encode(longest, "row")["input_ids"]) - 2)
    assert enc.count_tokens(longest, "row") == len(enc.encode(longest, "row")["input_ids"]) == enc.options.seq_length


def test_a_row_that_cannot_be_counted_is_one_that_cannot_be_encoded(encoder, pictures, tmp_path):
    (tmp_path / "a.png").write_text("hello")
    (tmp_path / "b.png").write_bytes(Path(pictures[0]).read_bytes()[:-200])
    for path, seq_length in (("a.png", None), (pictures[0], 30), (pictures[0], 150)):
        enc = encoder("qwen3_vl", seq_length=seq_length)
        turns = [{"role": "user", "content": "<image>" + "What? " * 40}, {"role": "assistant", "content": "x"}]
        said = []
        for attempt in (enc.encode, enc.count_tokens):
            with pytest.raises(UserError) as raised:
                attempt(row(turns, [str(tmp_path / path)]), "row")
            said.append(str(raised.value))
        assert said[0] == said[1]
    assert encoder("qwen3_vl").count_tokens(row(turns, [str(tmp_path / "b.png")]), "row") > 100  # only decoding tells


def test_crop_to_patches_of_internvl(encoder, pictures):
    one = encoder("internvl").encode(row(conversation(), pictures), "row")
    many = encoder("internvl", crop_to_patches=True).encode(row(conversation(), pictures), "row")
    assert one["pixel_values"].shape == (2, 3, 16, 16)
    assert len(many["pixel_values"]) > 2
    assert int((many["input_ids"] == encoder("internvl").processor.image_token_id).sum()) == 4 * len(
        many["pixel_values"]
    )


def test_the_line_break_after_an_image_is_not_doubled(encoder, pictures):
    enc = encoder("internvl")
    text = enc.tokenizer.decode(enc.encode(row(conversation(), pictures), "row")["input_ids"])
    assert "</img>\nWhat is here" in text
    text = encoder("qwen3_vl").tokenizer.decode(
        encoder("qwen3_vl").encode(row(conversation(), pictures), "row")["input_ids"]
    )
    assert "<|vision_end|>\nWhat is here" in text


def test_a_long_sample_loses_its_end_but_never_part_of_an_image(encoder, pictures, caplog):
    whole = encoder("qwen3_vl").encode(row(conversation(), pictures), "d.jsonl:7")
    length = len(whole["input_ids"])
    enc = encoder("qwen3_vl", seq_length=length - 4)
    for _ in range(2):
        cut = enc.encode(row(conversation(), pictures), "d.jsonl:7")
    assert len(caplog.records) == 1 and f"d.jsonl:7: the sample has {length} tokens" in caplog.text
    for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(cut[key], whole[key][: length - 4])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])

    last_image = int((whole["input_ids"] == enc.processor.image_token_id).nonzero().max())
    with pytest.raises(UserError, match=r"d.jsonl:7: .* would go through an image; raise --seq-length"):
        encoder("qwen3_vl", seq_length=last_image).encode(row(conversation(), pictures), "d.jsonl:7")
    with pytest.raises(UserError, match=r"d.jsonl:7: .* leave nothing to learn"):
        encoder("qwen3_vl", seq_length=last_image + 3).encode(row(conversation(), pictures), "d.jsonl:7")


def test_a_row_without_a_target_is_refused(encoder, monkeypatch):
    """However it comes about: it could never train anything."""
    encode = encoder("qwen3_vl")
    tokenize = encode._tokenize

    def unlabelled(*args):
        sample, image_tokens = tokenize(*args)
        sample["labels"][1:] = IGNORE_INDEX  # the first token is nobody's target
        return sample, image_tokens

    monkeypatch.setattr(encode, "_tokenize", unlabelled)
    with pytest.raises(UserError, match=r"^row 3: no token of the row has a label, .*; remove it$"):
        encode.encode(row(conversation(images=False), []), "row 3")


def test_patch_count_equal_to_the_length_does_not_confuse_the_cut(encoder, tmp_path):
    """pixel_values with as many rows as the sample has tokens is still not per token."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    messages = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]
    base = len(encoder("qwen3_vl").encode(row(messages, [str(tmp_path / "a.png")]), "row")["input_ids"])
    messages[1]["content"] = "x" * (256 - base + 1)
    sample = encoder("qwen3_vl", seq_length=250).encode(row(messages, [str(tmp_path / "a.png")]), "row")
    assert len(sample["input_ids"]) == 250 and len(sample["pixel_values"]) == 256


def test_an_encoder_can_be_sent_to_a_spawned_worker(encoder, pictures):
    enc = encoder("qwen3_vl", train_on_prompt=True)
    one, two = (e.encode(row(conversation(), pictures), "row") for e in (enc, pickle.loads(pickle.dumps(enc))))
    assert all(torch.equal(one[key], two[key]) for key in one)


THINKING = """{%- set last = messages | map(attribute='role') | list | length - 1 %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{%- set answer = m.content.split('</think>')[-1].lstrip('\n') %}
{%- if loop.index0 == last %}{{- m.content.split('</think>')[0] if '</think>' in m.content else '<think>\n\n' }}
{{- '</think>\n\n' + answer }}{%- else %}{{- answer }}{%- endif %}
{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"""


@pytest.mark.parametrize(("thinking", "last"), [(True, "<think>\n\n</think>\n\nno<|im_end|>"), (False, "no<|im_end|>")])
def test_templates_that_print_an_empty_thought_in_the_last_turn(thinking, last, tmp_path):
    save_tiny_processor("text", tmp_path, chat_template=THINKING)
    enc = ConversationEncoder(EncodingOptions(str(tmp_path), enable_thinking=thinking))
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "no"},
    ]
    assert targets(enc.encode(row(messages, []), "row"), enc) == ["yes<|im_end|>", last]


def test_templates_that_take_lists_of_parts_only(tmp_path):
    template = """{% for m in messages %}<|im_start|>{{ m.role }}|{% for part in m.content %}{{ part.text }}{% endfor %}
{%- if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant|{% endif %}"""
    save_tiny_processor("text", tmp_path, chat_template=template)
    enc = ConversationEncoder(EncodingOptions(str(tmp_path)))
    assert targets(enc.encode(row(conversation(images=False), []), "row"), enc) == [
        "A temple.\nAnd a flower <3<|im_end|>",
        " red<|im_end|>",
    ]


def test_templates_that_break_the_conversation_are_refused(tmp_path):
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    ask = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    cases = {
        "does not print the text": "hello",
        "puts nothing between two turns": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "rewrites earlier turns": "{{ messages | length }} " + turns + ask,
        "does not print message 3 as it is written": (turns + ask).replace(
            "m.content", "m.content | replace('A ', '')"
        ),
    }
    for number, (problem, template) in enumerate(cases.items()):
        save_tiny_processor("text", tmp_path / str(number), chat_template=template)
        with pytest.raises(UserError, match=problem):
            ConversationEncoder(EncodingOptions(str(tmp_path / str(number)))).encode(
                row(conversation(False), []), "row"
            )


def test_a_folder_without_a_chat_template_is_named(tmp_path):
    tokenizer = save_tiny_processor("text", tmp_path / "with")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "without")
    with pytest.raises(UserError, match="has no chat template"):
        ConversationEncoder(EncodingOptions(str(tmp_path / "without")))
    with pytest.raises(UserError, match=r"row: the row has images but the model in .* takes none"):
        ConversationEncoder(EncodingOptions(str(tmp_path / "with"))).encode(row(conversation(), ["a.png"]), "row")
