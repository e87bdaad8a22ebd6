"""Outputs that are computed from one another, and the Gauss-Newton matrix of a loss of them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.gauss_newton import GaussNewton

Pair = namedtuple("Pair", "logits features")


@dataclass
class Result:
    logits: Tensor
    features: Tensor
    note: str = "n"


class Named:
    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.features = logits, features


class Net(nn.Module):
    """Logits, computed from features; what it returns is up to `packed`."""

    def __init__(self, packed: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.packed = nn.Linear(4, 5), nn.Linear(5, 3), packed
        self.double()

    def forward(self, inputs: Tensor) -> Any:
        features = torch.tanh(self.first(inputs))
        return self.packed(self.last(features), features)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 3, (12,), generator=generator)
    return torch.randn(12, 4, generator=generator, dtype=torch.float64), targets


def reference(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """J^T H_L J of (logits, features) as independent arguments of the loss, by torch alone."""
    net = Net(lambda logits, features: torch.cat([logits, features], dim=1))
    names = [name for name, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]
    shapes = [p.shape for p in net.parameters()]
    inputs, _ = data()

    def outputs(theta: Tensor) -> Tensor:
        parts = [part.reshape(s) for part, s in zip(theta.split(sizes), shapes, strict=True)]
        found = functional_call(net, dict(zip(names, parts, strict=True)), (inputs,))
        return found.reshape(-1)

    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    slope: Any = jacobian(outputs, theta)

    def of(z: Tensor) -> Tensor:
        return loss(*z.reshape(12, 8).split([3, 5], dim=1))

    curvature: Any = hessian(of, outputs(theta))
    return slope.T @ curvature @ slope


def matrix(net: nn.Module, loss: Any, given: Any = None, **options: Any) -> Tensor:
    objective = Objective(net, loss, data() if given is None else given, **options)
    return GaussNewton(objective) @ torch.eye(objective.num_parameters, dtype=torch.float64)


TARGETS = data()[1]
KINDS = {
    "tuple": (lambda z, h: (z, h), lambda o: o[0], lambda o: o[1]),
    "features first": (lambda z, h: [h, z], lambda o: o[1], lambda o: o[0]),
    "nested": (
        lambda z, h: {"a": (z, None), "b": {"c": h}},
        lambda o: o["a"][0],
        lambda o: o["b"]["c"],
    ),
    "named tuple": (Pair, lambda o: o.logits, lambda o: o.features),
    "dataclass": (Result, lambda o: o.logits, lambda o: o.features),
    "object": (Named, lambda o: o.logits, lambda o: o.features),
    "mapping": (lambda z, h: {"logits": z, "h": h}, lambda o: o["logits"], lambda o: o["h"]),
}


@pytest.mark.parametrize("kind", few(2, KINDS))
def test_an_output_that_the_loss_does_not_read_changes_nothing(kind: str) -> None:
    packed, logits, _ = KINDS[kind]
    found = matrix(Net(packed), lambda o, t: F.cross_entropy(logits(o), t))
    expected = reference(lambda z, h: F.cross_entropy(z, TARGETS))
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("kind", few(2, KINDS))
def test_two_outputs_of_which_one_is_computed_from_the_other_count_once_each(kind: str) -> None:
    packed, logits, features = KINDS[kind]

    def loss(z: Tensor, h: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z + h[:, :3].square(), t) + h.pow(4).mean()

    found = matrix(Net(packed), lambda o, t: loss(logits(o), features(o), t))
    expected = reference(lambda z, h: loss(z, h, TARGETS))
    assert torch.allclose(found, expected, atol=1e-12)
    chunked = matrix(Net(packed), lambda o, t: loss(logits(o), features(o), t), chunk_size=5)
    assert torch.allclose(chunked, expected, atol=1e-12)


class OwnLoss(nn.Module):
    """Returns its loss beside what its `net` returns."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Any]:
        output = self.net(x)
        return {"loss": self.loss(output, labels), **output}


def test_a_model_with_its_own_loss_reads_its_logits_and_not_its_features() -> None:
    both = Net(lambda z, h: {"features": h, "z": z})
    x, y = data()
    found = matrix(
        OwnLoss(both, lambda o, t: F.cross_entropy(o["z"], t)), None, {"x": x, "labels": y}
    )
    expected = reference(lambda z, h: F.cross_entropy(z, TARGETS))
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_model_whose_own_loss_reads_both_is_refused() -> None:
    both = Net(lambda z, h: {"features": h, "z": z})
    x, y = data()
    own = OwnLoss(both, lambda o, t: F.cross_entropy(o["z"], t) + o["features"].square().mean())
    with pytest.raises(InvalidInput, match=r"shape \(12, 3\) and another of shape \(12, 5\)"):
        matrix(own, None, {"x": x, "labels": y})


def test_a_loss_that_reads_what_the_model_does_not_return_is_refused() -> None:
    net = Net(lambda z, h: {"logits": z.detach() + 0 * h[:, :3]})
    x, y = data()
    own = OwnLoss(net, lambda o, t: F.cross_entropy(net.last(torch.tanh(net.first(x))), t))
    with pytest.raises(InvalidInput, match="not through the model's outputs alone"):
        matrix(own, None, {"x": x, "labels": y})
    plain = Net(lambda z, h: z)
    penalty = lambda o, t: F.cross_entropy(o, t) + plain.last.weight.square().sum()  # noqa: E731
    with pytest.raises(InvalidInput, match="not through the model's outputs alone"):
        matrix(plain, penalty)


def test_a_single_output_has_the_graph_that_it_had() -> None:
    seen: list[Tensor] = []
    net = Net(lambda z, h: seen.append(z) or z)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        assert output is seen[-1]
        return F.cross_entropy(output, target)

    matrix(net, loss)
