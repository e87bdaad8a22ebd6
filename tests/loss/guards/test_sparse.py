"""A model whose gradients would be sparse has the derivatives of the same model with dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.hessian import Hessian

TOKENS = torch.arange(6)
LOSS = nn.CrossEntropyLoss()


class Layers(nn.Sequential):
    def __init__(self, sparse: bool) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(6, 4, sparse=sparse), nn.Linear(4, 3))


class Functions(nn.Module):
    """The same by functions, and by `gather`."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.sparse = nn.Parameter(torch.randn(6, 3)), sparse

    def forward(self, tokens: Tensor) -> Tensor:
        rows = functional.embedding(tokens, self.table, sparse=self.sparse)
        index = tokens[:, None].expand(-1, 3)
        return rows * torch.gather(self.table, 0, index, sparse_grad=self.sparse)


@pytest.mark.parametrize("kind", [Layers, Functions])
def test_derivatives_are_dense_and_the_same(kind: type[nn.Module]) -> None:
    model = kind(True)
    found, expected = (
        Objective(m, LOSS, (TOKENS, TOKENS % 3), vectorize_up_to=0) for m in (model, kind(False))
    )
    theta = found.theta() + 0.1
    block = torch.randn(found.num_parameters, 4)
    assert torch.equal(found.gradient(theta), expected.gradient(theta))
    assert torch.equal(Hessian(found, theta) @ block, Hessian(expected, theta) @ block)


def test_the_users_own_gradients_stay_sparse() -> None:
    model = Layers(True)
    Objective(model, LOSS, (TOKENS, TOKENS % 3)).gradient()
    LOSS(model(TOKENS), TOKENS % 3).backward()
    gradient = next(model.parameters()).grad
    assert gradient is not None
    assert gradient.is_sparse


def test_a_training_with_sparse_gradients_is_watched() -> None:
    model = Layers(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = []
    for sparse in (True, False):
        model = Layers(sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = (TOKENS, TOKENS % 3)
        with watch(model, LOSS, data, optimizer, k=2, every=1, quiet=True) as watcher:
            for _ in range(2):
                optimizer.zero_grad()
                LOSS(model(TOKENS), TOKENS % 3).backward()
                optimizer.step()
        rows.append([row["sharpness"] for row in watcher.history])
    assert len(rows[0]) == 2
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)


def test_sparse_gradients_that_cannot_be_kept_away_are_refused_by_name() -> None:
    class Direct(Functions):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.embedding(self.table, tokens, -1, False, True)

    with pytest.raises(InvalidInput, match=r"'table'.*sparse"):
        Objective(Direct(True), LOSS, (TOKENS, TOKENS % 3)).gradient()
