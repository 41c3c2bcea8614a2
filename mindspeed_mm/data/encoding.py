"""Turn one conversation into the tensors a model trains on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from mindspeed_mm.data.audio import load_audio
from mindspeed_mm.data.conversations import PLACEHOLDERS
from mindspeed_mm.data.images import blank_image, image_size, load_image
from mindspeed_mm.data.processors import load_processor
from mindspeed_mm.data.prompts import ChatRenderer, Prompt
from mindspeed_mm.data.quarantine import BadSample
from mindspeed_mm.data.video import VideoLimits, load_video
from mindspeed_mm.errors import UserError

IGNORE_INDEX = -100
_OF_AUDIO = ("input_features", "input_features_mask", "feature_attention_mask", "input_values")
_SIZES = 1024  # of images that are remembered
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodingOptions:
    """How to encode; names are those of data.json.

    Attributes:
        folder: ``preprocess_parameters.model_name_or_path``.
        chat_template: text of a template to use instead of the folder's.
        seq_length: the longest sample, in tokens; None for no limit.
        packing: samples are packed into sequences of ``seq_length`` afterwards.
    """

    folder: str
    trust_remote_code: bool = False
    chat_template: str | None = None
    enable_thinking: bool = True
    seq_length: int | None = None
    train_on_prompt: bool = False
    mask_history: bool = False
    image_max_pixels: int = 768 * 768
    image_min_pixels: int = 32 * 32
    video: VideoLimits = field(default_factory=VideoLimits)
    crop_to_patches: bool = False
    min_patches: int | None = None
    max_patches: int | None = None
    packing: bool = False

    @property
    def pack_to(self) -> int | None:
        """Tokens of the sequence that samples are packed into; None if they are not."""
        return self.seq_length if self.packing else None


class ConversationEncoder:
    """Renders, tokenizes and labels conversations with the model's own processor.

    Labels are the token itself where the assistant speaks (content and end-of-turn token) and ``IGNORE_INDEX``
    elsewhere; image tokens never carry a label. A sample longer than ``seq_length`` loses its end, with one warning
    per process; it is an error if that would cut into an image or leave nothing to learn.
    """

    def __init__(self, options: EncodingOptions) -> None:
        """Load the processor and probe its chat template.

        Raises:
            UserError: the folder has no usable processor or template.
        """
        self.options = options
        self._load()

    def __getstate__(self) -> dict[str, Any]:
        # Processors are classes of ours without their video part, which pickle cannot name: a spawned worker loads
        # its own from the folder.
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options = state["options"]
        self._load()

    def _load(self) -> None:
        self.processor = load_processor(self.options.folder, self.options.trust_remote_code)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if self.options.chat_template is not None:
            self.processor.chat_template = self.options.chat_template
        self._is_text_only = self.processor is self.tokenizer
        self._takes_images = hasattr(self.processor, "image_processor")
        self._hears: Any = getattr(self.processor, "feature_extractor", None)
        self._renderer = ChatRenderer(self.processor, self.options.enable_thinking)
        self._image_options: dict[str, Any] = {}
        if self._takes_images and hasattr(self.processor.image_processor, "crop_to_patches"):
            for key in ("crop_to_patches", "min_patches", "max_patches"):
                if (value := getattr(self.options, key)) is not None:
                    self._image_options[key] = value
        self._warned = False
        self._stand_in: dict[str, torch.Tensor] | None = None
        self._written_for = lru_cache(_SIZES)(self._look_up_written)
        self._written: dict[int | None, str] = {}

    def encode(self, row: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
        """Return the model inputs of one conversation.

        Args:
            row: as ``read_conversations`` gives it.
            where: names the row in errors.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` and whatever else the processor gives per token, each of
            shape (L,) and int64; ``pixel_values`` and, for the families that have it, ``image_grid_thw`` as the
            processor gives them.

        Raises:
            BadSample: an image cannot be decoded, or the processor, the template or the length refuses the row.
        """
        return self._encode(row, where, blank=False)

    def count_tokens(self, row: Mapping[str, Any], where: str) -> int:
        """Return how many tokens `encode` gives, without decoding images and videos; audio is decoded.

        Args and errors are those of `encode`. What it does not find is a file that cannot be decoded. The stand-in of
        such a row is not longer than what is returned.
        """
        count = len(self._encode(row, where, blank=True)["input_ids"])
        return max(count, len(self.stand_in()["input_ids"])) if any(map(row.get, PLACEHOLDERS)) else count

    def _encode(self, row: Mapping[str, Any], where: str, blank: bool) -> dict[str, torch.Tensor]:
        images = row.get("images") or []
        if images and not self._takes_images:
            raise BadSample(where, f"the row has images but the model in {self.options.folder} takes none")
        options = self.options
        audios = row.get("audios") or []
        if audios and self._hears is None:
            raise BadSample(where, f"the row has audio but the model in {options.folder} takes none; remove the row")
        videos = row.get("videos") or []
        if videos and not hasattr(self.processor, "video_processor"):
            raise BadSample(
                where,
                f"the row has videos but the processor in {options.folder} takes none; install torchvision if its "
                "model does, or remove the row",
            )
        clips = [load_video(path, where, self.processor.video_processor, options.video, blank) for path in videos]
        limits = options.image_max_pixels, options.image_min_pixels
        pictures = [(image_size if blank else load_image)(path, where, *limits) for path in images]
        longest = getattr(self._hears, "n_samples", None)
        sounds = [load_audio(path, where, self._hears.sampling_rate, longest) for path in audios]
        with _bad_sample(where):
            prompt = self._renderer.render(row)
            sample = self._shorten(*self._tokenize(prompt, pictures, clips, sounds), where)
        if (sample["labels"][1:] == IGNORE_INDEX).all():
            raise BadSample(where, "no token of the row has a label, so nothing can be learnt from it; remove it")
        return sample

    def stand_in(self) -> dict[str, torch.Tensor]:
        """Return a short text sample without a target."""
        if self._stand_in is None:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            self._stand_in, _ = self._tokenize(self._renderer.render({"messages": turns}))
            self._stand_in["labels"].fill_(IGNORE_INDEX)
        return dict(self._stand_in)

    def encode_question(self, row: Mapping[str, Any], where: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return a conversation up to its last answer as a batch of one, and the token ids of that answer, (A,).

        Args and errors are those of `encode`.
        """
        encoder = copy(self)
        encoder.options = replace(self.options, seq_length=None, train_on_prompt=False, mask_history=True)
        sample = encoder.encode(row, where)
        answer = (sample.pop("labels") != IGNORE_INDEX).nonzero().flatten()
        start = int(answer[0])
        tokens = sample["input_ids"][answer]
        length = len(sample["input_ids"])
        return {key: v[None, :start] if v.shape == (length,) else v for key, v in sample.items()}, tokens

    def _tokenize(
        self,
        prompt: Prompt,
        pictures: Sequence[Any] = (),
        clips: Sequence[tuple[Any, Any]] = (),
        sounds: Sequence[Any] = (),
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the sample and a mask (L,) of its image tokens."""
        encoded = self._process(prompt, pictures, clips, sounds)
        replaced = encoded.pop("text_replacement_offsets", [[]])[0]
        for key, value in encoded.items():
            # transformers looks at each number by itself, which takes longer than all else that is done with a text.
            if isinstance(value, list) and len(value) == 1 and (array := np.array(value)).dtype.kind == "i":
                encoded[key] = torch.from_numpy(array)
        encoded = encoded.convert_to_tensors("pt")
        starts, ends = encoded.pop("offset_mapping")[0].unbind(-1)

        def covers(spans: list[tuple[int, int]]) -> torch.Tensor:
            mask = torch.zeros(len(starts), dtype=torch.bool)
            for begin, end in spans:
                mask |= (starts < end) & (ends > begin)
            return mask

        # One row was encoded: keys of shape (1, L) are per token, the others belong to the media; those of audio have
        # a shape (1, ...) of their own, which may be the same.
        length = len(starts)
        sample = {k: v[0] if v.shape[:2] == (1, length) and k not in _OF_AUDIO else v for k, v in encoded.items()}
        turns = prompt.turns[-1:] if self.options.mask_history else prompt.turns
        image_tokens = covers([item["new_span"] for item in replaced])
        target = covers([_moved(span, replaced) for span in turns])
        if self.options.train_on_prompt:
            target[:] = True
        sample["labels"] = sample["input_ids"].masked_fill(~target | image_tokens, IGNORE_INDEX)
        return sample, image_tokens

    def _process(
        self, prompt: Prompt, pictures: Sequence[Any], clips: Sequence[tuple[Any, Any]] = (), sounds: Sequence[Any] = ()
    ) -> Any:
        """Return what the processor makes of them; sizes in place of pictures stand for blank ones."""
        # As in apply_chat_template: where the template has written the BOS token, a second one would be wrong.
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and prompt.text.startswith(bos)
        special = (not self._is_text_only or prompt.is_document) and not has_bos
        kwargs: dict[str, Any] = {"return_offsets_mapping": True, "add_special_tokens": special}
        if pictures and isinstance(pictures[0], tuple):
            from transformers import BatchEncoding

            if not clips and not sounds and hasattr(self.processor, "get_text_with_replacements"):
                written = [self._written_for(size) for size in pictures]
                texts, replaced = self.processor.get_text_with_replacements([prompt.text], written)
                return BatchEncoding({**self.tokenizer(texts, **kwargs), "text_replacement_offsets": replaced})
            pictures = [blank_image(size) for size in pictures]
        if pictures:
            kwargs.update(images=list(pictures), images_kwargs={**self._image_options, "return_tensors": "pt"})
        if clips:
            frames, metadata = zip(*clips, strict=True)
            kwargs.update(videos=list(frames), video_metadata=list(metadata), do_sample_frames=False)
        if sounds:
            kwargs.update(audio=list(sounds), sampling_rate=self._hears.sampling_rate)
        if pictures or clips or sounds:
            kwargs.update(return_text_replacement_offsets=True)
        return self.processor(text=[prompt.text], **kwargs)

    def _look_up_written(self, size: tuple[int, int]) -> str:
        """Return what the processor writes for an image of that width and height in place of its mark.

        It may be that of an image of another size, with as many tokens.
        """
        tokens = self._tokens_of_image(size)
        if tokens in self._written:
            return self._written[tokens]
        turns = [{"role": "user", "content": PLACEHOLDERS["images"]}, {"role": "assistant", "content": "!"}]
        prompt = self._renderer.render({"messages": turns, "images": ["blank"]})
        found = self._process(prompt, [blank_image(size)])["text_replacement_offsets"][0][0]["replacement"]
        if len(self.tokenizer(found, add_special_tokens=False)["input_ids"]) == tokens:  # the formula holds
            self._written[tokens] = found
        return found

    def _tokens_of_image(self, size: tuple[int, int]) -> int | None:
        """Return how many tokens an image has, None if the processor has no formula for it."""
        try:
            formula = self.processor._get_num_multimodal_tokens
            return formula(image_sizes=[size[::-1]], **self._image_options).num_image_tokens[0]
        except Exception:  # noqa: BLE001 - it is the model's own code, made for others
            return None

    def _shorten(
        self, sample: dict[str, torch.Tensor], image_tokens: torch.Tensor, where: str
    ) -> dict[str, torch.Tensor]:
        limit, length = self.options.seq_length, len(image_tokens)
        if limit is None or length <= limit:
            return sample
        problem = f"the sample has {length} tokens, --seq-length allows {limit}"
        if image_tokens[limit:].any():
            raise UserError(
                f"{problem} and the cut would go through an image; raise --seq-length, lower image_max_pixels in "
                "preprocess_parameters, or shorten the row"
            )
        if (sample["labels"][:limit] == IGNORE_INDEX).all():
            raise UserError(
                f"{problem} and the cut would leave nothing to learn; raise --seq-length or shorten the row"
            )
        if not self._warned:
            self._warned = True
            logger.warning("%s: %s: its end is cut off. Further cuts are not reported.", where, problem)
        return {k: v[:limit] if v.shape == (length,) else v for k, v in sample.items()}


@contextmanager
def _bad_sample(where: str) -> Iterator[None]:
    """Turn what templates and processors, the model's own code, raise about a row into BadSample."""
    try:
        yield
    except UserError as error:
        raise BadSample(where, str(error)) from None
    except Exception as error:
        raise BadSample(where, f"the model's processor refuses this row: {error}") from error


def _moved(span: tuple[int, int], replaced: list[dict[str, Any]]) -> tuple[int, int]:
    """Return where a character span of the prompt lies after the processor has expanded the image placeholders."""

    def move(position: int) -> int:
        grown = (len(item["replacement"]) - len(item["text"]) for item in replaced if item["span"][1] <= position)
        return position + sum(grown)

    return move(span[0]), move(span[1])
