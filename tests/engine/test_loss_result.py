"""The documented return forms of loss_func."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.engine.loss_result import read_loss
from mindspeed_mm.errors import UserError

LOSS = torch.tensor(2.0, requires_grad=True)


def test_a_plain_loss_is_reported_as_loss() -> None:
    result = read_loss(LOSS, per_token_loss=False)
    assert result.loss is LOSS or result.loss.item() == 2.0
    assert result.report["loss"].item() == 2.0
    assert not result.report["loss"].requires_grad
    assert result.num_tokens is None


def test_a_pair_and_a_loss_of_shape_one() -> None:
    result = read_loss((LOSS.unsqueeze(0), {"loss": 1.0}), per_token_loss=False)
    assert result.loss.shape == ()
    assert result.report == {"loss": 1.0}


def test_a_triple() -> None:
    result = read_loss((LOSS, torch.tensor([7]), {}), per_token_loss=True)
    assert result.num_tokens.item() == 7
    numerator, denominator = result.report["loss"]
    assert (numerator.item(), denominator.item()) == (2.0, 7)


@pytest.mark.parametrize(("tokens", "mean"), [(8, 0.25), (0, 2.0), (0.5, 4.0)])
def test_a_triple_without_the_flag_is_logged_as_the_mean_that_is_optimised(tokens: float, mean: float) -> None:
    result = read_loss((LOSS, tokens, {}), per_token_loss=False)
    assert result.report["loss"].item() == result.mean.item() == mean
    assert not result.report["loss"].requires_grad and result.mean.requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "loss_func returned a NoneType"),
        ((LOSS, 1, 2, 3), "a tuple of length 4"),
        (torch.zeros(3), r"a tensor of shape \(3,\) as the loss"),
        ((2.0, {}), "a float as the loss"),
        ((LOSS, [1]), "a list as the report"),
        ((LOSS, torch.ones(2), {}), r"a tensor of shape \(2,\) as num_tokens"),
        ((LOSS, "7", {}), "a str as num_tokens"),
    ],
)
def test_anything_else_is_an_error_that_names_the_forms(value: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_loss(value, per_token_loss=False)
    assert "(loss_sum, num_tokens, report)" in str(error.value)


@pytest.mark.parametrize("value", [torch.ones(4), "train", None, (1.0, 2.0, 3.0), (torch.ones(2), 2)])
def test_a_reported_value_that_is_no_number_is_named(value: object) -> None:
    with pytest.raises(UserError, match="as 'each': it must be one number, or a pair"):
        read_loss((LOSS, {"loss": 1.0, "each": value}), per_token_loss=False)


@pytest.mark.parametrize("value", [1, 0.5, True, torch.ones(1, 1), (torch.tensor(3), 4), [torch.ones(1), 2.0]])
def test_numbers_and_pairs_of_them_are_reported(value: object) -> None:
    assert read_loss((LOSS, {"each": value}), per_token_loss=False).report == {"each": value}
