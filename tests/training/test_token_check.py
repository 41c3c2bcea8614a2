"""Token ids against the vocabulary, on the host."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mindspeed_mm.errors import UserError
from mindspeed_mm.training.feed import count_samples
from mindspeed_mm.training.step_feed import TakenBatch, count_targets
from mindspeed_mm.training.token_check import TokenCheck


class Language(nn.Module):
    """10 tokens go in, 8 come out, and images are marked by token 11, which is replaced before it is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_token_id=11)
        self.embeddings, self.head = nn.Embedding(10, 2), nn.Linear(2, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def check(ids: list[int], labels: list[int], names: list[str] | None = None) -> None:
    TokenCheck(Language())({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}, lambda: names)


def test_whatever_the_model_has_passes() -> None:
    check([0, 9, 11, 11], [-100, 7, 0, -100])


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([0, 10], [0, 0], "a.jsonl:3: input_ids has 10 at position 1, the model's vocabulary has 10 tokens"),
        ([0, -100], [0, 0], "a.jsonl:3: input_ids has -100 at position 1"),
        ([0, 1], [8, 0], "a.jsonl:3: labels has 8 at position 0, the model's vocabulary has 8 tokens"),
        ([0, 1], [11, 0], "a.jsonl:3: labels has 11 at position 0"),
    ],
)
def test_the_first_that_it_lacks_is_named(ids: list[int], labels: list[int], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check(ids, labels, ["a.jsonl:3"])


def test_padding_before_tokens_is_refused_where_the_model_has_it_at_the_end_only() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]])}
    model = Language()
    TokenCheck(model)(batch, lambda: ["a", "b"])
    model.blueprint = SimpleNamespace(model=model)
    for built in (model, nn.ModuleList([model])):
        with pytest.raises(UserError, match=r"^b: attention_mask has padding before tokens.*on the right"):
            TokenCheck(built)(batch, lambda: ["a", "b"])
        TokenCheck(built)({**batch, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, lambda: None)


def test_the_sample_of_a_packed_row_is_named() -> None:
    """Three samples of 2, 3 and 1 tokens, then padding; the second one has the token, as its last."""
    ids = torch.tensor([[1, 2, 3, 4, 10, 5, 0, 0]])
    batch = {"input_ids": ids, "cu_seqlens": torch.tensor([0, 2, 5, 6], dtype=torch.int32)}
    with pytest.raises(UserError, match=r"^b: input_ids has 10 at position 2, the model"):
        TokenCheck(Language())(batch, lambda: ["a", "b", "c"])
    assert count_samples(batch) == 3


def test_other_models_and_other_batches_are_left_alone() -> None:
    TokenCheck(nn.Linear(2, 2))({"input_ids": torch.tensor([[99]])}, lambda: None)
    for batch in ([99], {"x": 1}, {"input_ids": torch.tensor([99])}, {"input_ids": torch.tensor([[99.0]])}):
        TokenCheck(Language())(batch, lambda: None)
    images = {"input_ids": torch.tensor([[1]]), "labels": torch.tensor([99])}  # of another task
    TokenCheck(Language())(images, lambda: None)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"input_ids": torch.zeros(1, 3), "labels": torch.tensor([[5, -100, 7]])}, 1),
        ({"input_ids": torch.zeros(1, 3), "labels": torch.tensor([[5, -100, -100]])}, 0),
        ({"input_ids": torch.zeros(1, 3), "labels": torch.tensor([4])}, None),
        ({"x": torch.zeros(1, 3), "labels": torch.tensor([[4]])}, None),
    ],
)
def test_only_labels_of_tokens_tell_that_nothing_is_a_target(batch: dict[str, torch.Tensor], count: int | None) -> None:
    assert count_targets([TakenBatch(batch, {}, None, 0, 1)]) == count
