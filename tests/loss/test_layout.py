from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.networks import Attention
from thalweg.errors import InvalidInput
from thalweg.loss.layout import ParameterLayout


def test_write_puts_back_what_read_copied() -> None:
    model = Attention()
    layout = ParameterLayout.from_model(model)
    theta = layout.read(model)
    layout.write(model, theta + 1)
    assert torch.equal(layout.read(model), theta + 1)
    layout.write(model, theta)
    assert torch.equal(layout.read(model), theta)


def test_read_is_a_copy() -> None:
    model = nn.Linear(1, 1, bias=False)
    layout = ParameterLayout.from_model(model)
    layout.read(model).zero_()
    assert float(model.weight.detach().abs()) > 0


def test_a_tied_parameter_counts_once() -> None:
    model = Attention()
    layout = ParameterLayout.from_model(model)
    assert "head.weight" not in layout.names
    assert layout.num_parameters == sum(p.numel() for p in model.parameters())


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    assert ParameterLayout.from_model(model).names == ("1.weight", "1.bias")


def test_patterns_choose_parameters_in_the_order_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    layout = ParameterLayout.from_model(model, ["1.*", "0.weight"])
    assert layout.names == ("0.weight", "1.weight", "1.bias")
    assert ParameterLayout.from_model(model, "1.*").names == ("1.weight", "1.bias")


def test_a_pattern_without_a_match_names_the_parameters_there_are() -> None:
    with pytest.raises(InvalidInput, match=r"'head\.\*'.*weight, bias"):
        ParameterLayout.from_model(nn.Linear(2, 1), ["weight", "head.*"])


def test_no_pattern_at_all_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one pattern"):
        ParameterLayout.from_model(nn.Linear(2, 1), [])


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(InvalidInput, match="requires_grad_"):
        ParameterLayout.from_model(nn.Linear(2, 1).requires_grad_(False))


def test_unflatten_shapes_vectors_and_blocks_and_flatten_joins_them() -> None:
    model = nn.Linear(3, 2)
    layout = ParameterLayout.from_model(model)
    vector = torch.arange(8.0)
    weight, bias = layout.unflatten(vector)
    assert (weight.tolist(), bias.tolist()) == ([[0, 1, 2], [3, 4, 5]], [6, 7])
    assert torch.equal(layout.flatten([weight, bias]), vector)
    assert torch.equal(layout.flatten({"bias": bias, "weight": weight}), vector)
    assert [tuple(t.shape) for t in layout.unflatten(torch.zeros(5, 8))] == [(5, 2, 3), (5, 2)]


def test_a_vector_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(InvalidInput, match="a last dimension of 8"):
        ParameterLayout.from_model(nn.Linear(3, 2)).unflatten(torch.zeros(7))
