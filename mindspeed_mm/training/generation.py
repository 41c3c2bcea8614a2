"""Answers that the model generates for a few validation samples, beside those that the data has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mindspeed_mm import accelerator
from mindspeed_mm.data.datasets import ConversationDataset, Question
from mindspeed_mm.data.quarantine import BadSample
from mindspeed_mm.distributed.state import print_rank_last
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.transformers_model import TransformersModel
from mindspeed_mm.training.evaluation import undisturbed
from mindspeed_mm.training.reporting import TrainingLog
from mindspeed_mm.training.sinks import Shown

if TYPE_CHECKING:
    from mindspeed_mm.training.loop import Progress

_MARGIN = 8
"""Tokens that an answer may be longer than the right one, so that it can be seen how it is wrong."""


class GenerationCheck:
    """Generates the last answer of the first ``count`` samples of each validation set, greedily.

    All ranks generate the same samples at the same time: sharded parameters are gathered by all or by none.

    Args:
        model: the sharded model.
        valid: the validation iterators by the name of the data set.
        count: samples of each data set.
        dtype: of floating inputs.

    Raises:
        UserError: the model or the data is not one of ours, which know what a prompt is.
    """

    def __init__(self, model: nn.Module, valid: Mapping[str, Iterator[Any]], count: int, dtype: torch.dtype) -> None:
        if not isinstance(model, TransformersModel) or not model.model.can_generate():
            raise UserError(
                f"--eval-generate {count}: {type(model).__name__} cannot generate; it needs a TransformersModel whose "
                "model has a language head. Remove the flag."
            )
        if not valid:
            raise UserError(f"--eval-generate {count}: there is no validation data; set val_dataset or val_rate.")
        self.model = model
        self.dtype = dtype
        self.datasets: dict[str, Any] = {}
        for name, iterator in valid.items():
            dataset = getattr(getattr(iterator, "loader", None), "dataset", None)
            dataset = getattr(dataset, "dataset", dataset)  # inside the loader's own wrapper
            if not isinstance(dataset, ConversationDataset):
                raise UserError(
                    f"--eval-generate {count}: the validation data is a {type(dataset).__name__}; only data of "
                    "dataset_type 'huggingface' in data.json says where an answer begins. Remove the flag."
                )
            self.datasets[name] = (dataset, min(count, len(dataset)))

    def run(self, progress: Progress, log: TrainingLog) -> None:
        """Generate, print how many answers are exactly right, and record them. A collective."""
        right, shown = 0, []
        with undisturbed(self.model):
            for name, (dataset, count) in self.datasets.items():
                for index in range(count):
                    try:
                        question = dataset.question(index)
                    except BadSample:
                        if dataset.quarantine is None:
                            raise
                        continue  # on every rank; validation itself lists it
                    matches, sample = self._answer(dataset, question, index, f"validation {name}".strip())
                    right += matches
                    shown.append(sample)
        print_rank_last(f" generation at iteration {progress.iteration} | exact match: {right} of {len(shown)}")
        log.generations(progress.iteration, progress.consumed_samples, right / max(len(shown), 1), shown)

    def _answer(self, dataset: ConversationDataset, question: Question, index: int, name: str) -> tuple[bool, Shown]:
        device = accelerator.device()
        inputs = {k: v.to(device, self.dtype if v.is_floating_point() else None) for k, v in question.inputs.items()}
        tokens = self.model.generate(
            **inputs, max_new_tokens=len(question.answer) + _MARGIN, stop=[int(question.answer[-1])]
        )
        texts = [
            dataset.encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()
            for ids in (question.inputs["input_ids"][0], question.answer, tokens)
        ]
        prompt, expected, generated = texts
        text = f"**prompt** {prompt}\n\n**expected** {expected}\n\n**generated** {generated}"
        return generated == expected, Shown(f"{name} sample {index}", text, question.pictures)
