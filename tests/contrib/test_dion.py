from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tests.optim.resuming import save_and_restore
from tests.sampling import few
from thalweg.contrib.dion import Dion, power_step
from thalweg.contrib.grad_power import GradPower
from thalweg.errors import InvalidInput
from thalweg.optim.combined import Combined
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace

Matrix = NDArray[np.float64]
INPUTS = torch.linspace(-1, 1, 120).reshape(40, 3).sin()
TARGETS = torch.linspace(1, 0, 80).reshape(40, 2).cos()


def gradients(shape: tuple[int, int], steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [fixed + 0.5 * each for each in noise]


def started(weight: nn.Parameter, **settings: Any) -> tuple[Dion, Matrix]:
    """The optimizer and the start of Q, which a step with a gradient of zero leaves as it is."""
    optimizer = Dion([weight], **settings)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    weight.data.copy_(before)
    return optimizer, optimizer.state[weight]["Q"].double().numpy().copy()


def published(X: Matrix, M: Matrix, Q: Matrix, G: Matrix, lr: float, mu: float, wd: float) -> Any:
    """A step by the formulas of the public simple version; X, M, Q after it."""
    M = M + G
    P, _ = np.linalg.qr(M @ Q)
    R = M.T @ P
    M = M - (1 - mu) * P @ R.T
    Q = R / (np.linalg.norm(R, axis=0, keepdims=True) + 1e-8)
    scale = (X.shape[0] / X.shape[1]) ** 0.5
    return X * (1 - wd * lr) - scale * lr * P @ Q.T, M, Q


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "transpose_wide"), [((6, 4), True), ((4, 6), False), ((4, 6), True), ((5, 5), True)]
)
def test_steps_are_those_of_the_published_formulas(
    shape: tuple[int, int], transpose_wide: bool, rank: int, dtype: torch.dtype
) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape).to(dtype))
    settings = {"lr": 0.1, "mu": 0.8, "weight_decay": 0.3}
    optimizer, Q = started(weight, rank=rank, transpose_wide=transpose_wide, **settings)
    turned = transpose_wide and shape[0] < shape[1]
    assert Q.shape == ((shape[0] if turned else shape[1]), rank)
    X, M = weight.detach().double().numpy().copy(), np.zeros(shape)
    for gradient in gradients(shape, 8):
        weight.grad = gradient.to(dtype)
        optimizer.step()
        if turned:
            # The transpose's own steps, but for sqrt(m / n), which is that of X.
            lr, m, n = settings["lr"], *shape
            still, M_T, Q = published(0 * X.T, M.T, Q, gradient.numpy().T, lr, 0.8, 0.0)
            X, M = X * (1 - lr * 0.3) + still.T * (m / n), M_T.T
        else:
            X, M, Q = published(X, M, Q, gradient.numpy(), *settings.values())
    accuracy = 2e-4 if dtype == torch.float32 else 1e-10
    assert np.allclose(weight.detach().numpy(), X, atol=accuracy)
    assert np.allclose(optimizer.state[weight]["momentum"].numpy(), M, atol=accuracy)
    assert np.allclose(optimizer.state[weight]["Q"].numpy(), Q, atol=accuracy)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
@pytest.mark.parametrize("transpose_wide", [False, True])
def test_at_full_rank_the_update_goes_to_the_orthogonalized_momentum(
    shape: tuple[int, int], transpose_wide: bool
) -> None:
    # Without error feedback (mu = 1) and without new gradients the momentum stays as it is.
    generator = torch.Generator().manual_seed(1)
    U, _ = torch.linalg.qr(torch.randn(shape[0], 4, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(shape[1], 4, generator=generator, dtype=torch.float64))
    momentum = U @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]).double()) @ V.T
    weight = nn.Parameter(torch.zeros(shape).double())
    optimizer = Dion(
        [weight], lr=1.0, mu=1.0, weight_decay=0.0, transpose_wide=transpose_wide, eps=1e-300
    )
    errors = []
    for step in range(20):
        weight.grad = momentum if step == 0 else torch.zeros_like(momentum)
        before = weight.detach().clone()
        optimizer.step()
        update = (before - weight.detach()) / (shape[0] / shape[1]) ** 0.5
        errors.append(float(torch.linalg.matrix_norm(update - U @ V.T)))
    assert torch.allclose(optimizer.state[weight]["momentum"], momentum, rtol=1e-14)
    # Singular values a factor of two apart: power iteration divides its error by four a step.
    assert errors[-1] < 1e-9
    assert errors[12] / errors[9] == pytest.approx(4.0**-3, rel=0.1)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_a_gradient_of_rank_one_makes_updates_of_rank_one(shape: tuple[int, int]) -> None:
    left = torch.linspace(1, 2, shape[0]).sin()
    right = torch.linspace(-1, 2, shape[1]).cos()
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = Dion([weight], lr=1.0, weight_decay=0.0)
    direction = torch.outer(left, right) / (left.norm() * right.norm())
    for step in range(50):
        # It cancels most of the momentum at times, which leaves the rounding of what was.
        weight.grad = direction * (-1.0 if step % 7 == 6 else 0.3)
        momentum = optimizer.state[weight]["momentum"].clone() if step else torch.zeros(shape)
        sign = float(((momentum + weight.grad) * direction).sum().sign())
        before = weight.detach().clone()
        optimizer.step()
        update = (before - weight.detach()) / (shape[0] / shape[1]) ** 0.5
        assert torch.allclose(update, sign * direction, atol=1e-4), step


def test_unguarded_formulas_would_make_full_size_noise_of_it() -> None:
    direction = torch.outer(torch.linspace(1, 2, 12).sin(), torch.linspace(-1, 2, 9).cos())
    X, M, Q = np.zeros((12, 9), np.float32), np.zeros((12, 9), np.float32), np.eye(9)
    X, _, _ = published(X, M, Q.astype(np.float32), direction.numpy(), 1.0, 0.95, 0.0)
    assert np.linalg.matrix_rank(X, tol=0.1) > 1
    weight = nn.Parameter(torch.zeros(12, 9))
    weight.grad = direction
    Dion([weight], lr=1.0).step()
    assert np.linalg.matrix_rank(weight.detach().numpy(), tol=1e-5) == 1


def test_a_surplus_column_takes_part_again_when_the_rank_grows() -> None:
    weight = nn.Parameter(torch.zeros(5, 4))
    optimizer = Dion([weight], lr=1.0, weight_decay=0.0)
    for rank in (0, 1, 2, 3, 4, 4):
        weight.grad = torch.eye(5, 4) * (torch.arange(4) < rank)
        before = weight.detach().clone()
        optimizer.step()
        values = torch.linalg.svdvals(before - weight.detach())
        assert int((values > 0.1).sum()) == rank
        assert torch.all(values[rank:] < 1e-6)


def test_a_momentum_of_zero_makes_no_update_and_keeps_q() -> None:
    factors = power_step(torch.zeros(2, 5, 4), torch.ones(2, 4, 3))
    assert bool(factors.surplus.all())
    assert not factors.left.any()
    assert not factors.right.any()
    assert torch.equal(factors.following, torch.ones(2, 4, 3))


def test_a_gradient_that_is_no_number_is_not_hidden() -> None:
    weight = nn.Parameter(torch.zeros(3, 3))
    weight.grad = torch.full((3, 3), float("nan"))
    Dion([weight], lr=1.0).step()
    assert bool(weight.detach().isnan().any())


@pytest.mark.parametrize(
    ("fraction", "rank", "expected"),
    [(1.0, None, 6), (0.5, None, 3), (0.4, None, 3), (0.01, None, 1), (1.0, 2, 2), (0.1, 99, 6)],
)
def test_the_rank_is_a_fraction_of_the_smaller_side_or_given(
    fraction: float, rank: int | None, expected: int
) -> None:
    for shape in ((6, 10), (10, 6)):
        weight = nn.Parameter(torch.zeros(shape))
        _, Q = started(weight, rank_fraction=fraction, rank=rank)
        assert Q.shape == (6, expected)


def test_the_start_is_a_function_of_the_seed_and_the_place_of_the_matrix() -> None:
    def starts(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        weights = [nn.Parameter(torch.zeros(40, 30, dtype=dtype)) for _ in range(2)]
        optimizer = Dion(weights, seed=seed)
        # The other way around in time: the place counts, not who moves first.
        for weight in reversed(weights):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        return [optimizer.state[weight]["Q"] for weight in weights]

    first, again, other = starts(0), starts(0), starts(1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert torch.allclose(starts(0, torch.float32)[1].double(), first[1], atol=1e-6)
    for one, two in ((first[0], first[1]), (first[0], other[0]), (first[1], other[0])):
        assert abs(float((one * two).mean())) < 0.15
    assert float(first[0].mean()) == pytest.approx(0, abs=0.1)
    assert float(first[0].std()) == pytest.approx(1, abs=0.1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def backward(model: nn.Module, rows: Tensor) -> Tensor:
    model.zero_grad()
    loss = nn.functional.mse_loss(model(INPUTS[rows]), TARGETS[rows])
    loss.backward()
    return loss


def rows_of(step: int) -> Tensor:
    return (torch.arange(10) * 7 + step) % 40


def built(model: nn.Module, group: Any = None) -> Combined:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    dion = Dion(matrices, lr=0.02, rank_fraction=0.5, process_group=group)
    return Combined([dion, AdamW(vectors, lr=0.01)])


def test_matrices_of_one_shape_step_as_each_would_alone() -> None:
    together = [nn.Parameter(torch.zeros(6, 4).double()) for _ in range(3)]
    optimizer = Dion(together, lr=0.1, rank=2)
    alone = []
    for _ in range(3):
        weights = [nn.Parameter(torch.zeros(6, 4).double()) for _ in range(3)]
        alone.append((Dion(weights, lr=0.1, rank=2), weights))
    for number in range(3):
        for own, gradient in enumerate(gradients((6, 4), 3, seed=number)):
            together[own].grad = gradient
        optimizer.step()
        for own, (single, weights) in enumerate(alone):
            weights[own].grad = together[own].grad
            single.step()
    for own, (_, weights) in enumerate(alone):
        assert torch.allclose(weights[own], together[own], rtol=1e-9)
        assert bool(together[own].any())


def test_each_group_has_its_own_settings() -> None:
    one, other = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    groups = [{"params": [one], "lr": 0.5, "rank": 1}, {"params": [other]}]
    optimizer = Dion(groups, lr=0.1)
    one.grad = gradients((4, 4), 1)[0].float()
    other.grad = one.grad.clone()
    optimizer.step()
    assert float(one.detach().norm()) == pytest.approx(0.5, rel=1e-5)
    assert 0.15 < float(other.detach().norm()) <= 0.2 + 1e-6


@pytest.mark.parametrize("wrapped", ["combined", "split", "power"])
def test_its_state_can_be_saved_and_restored(wrapped: str) -> None:
    def build() -> tuple[nn.Module, Optimizer]:
        model = network()
        if wrapped == "combined":
            return model, built(model)
        if wrapped == "power":
            return model, GradPower(built(model))
        parameters = list(model.parameters())
        source = FixedSubspace(random_subspace(sum(p.numel() for p in parameters), 3, 0))
        return model, SplitUpdate(built(model), source, 0.0, 1.0, parameters=parameters)

    def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
        backward(model, rows_of(number))
        optimizer.step()

    save_and_restore(build, step)


def test_it_trains_with_a_closure_and_leaves_the_gradients_alone() -> None:
    model = network()
    optimizer = built(model)
    losses = []
    for _ in range(60):
        losses.append(float(optimizer.step(lambda: backward(model, torch.arange(40))).detach()))
    assert losses[-1] < 0.2 * losses[0]
    dion, before = optimizer.optimizers[0], [p.grad for p in model.parameters()]
    copies = [gradient.clone() for gradient in before if gradient is not None]
    dion.step()
    for p, gradient, value in zip(model.parameters(), before, copies, strict=True):
        assert p.grad is gradient
        assert torch.equal(value, p.grad)


def test_a_matrix_without_a_gradient_stays() -> None:
    idle, moving = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Dion([idle, moving])
    optimizer.step()
    moving.grad = torch.eye(2)
    optimizer.step()
    assert torch.equal(idle, torch.ones(2, 2))
    assert not torch.equal(moving, torch.ones(2, 2))
    assert idle not in optimizer.state


def test_what_is_no_matrix_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match=r"parameter 0\.weight: got \(2, 1, 3, 3\).*Combined"):
        Dion(model.named_parameters())
    with pytest.raises(InvalidInput, match=r"parameter number 1: got \(2,\), allowed: matrices"):
        Dion(model[1].parameters())
    optimizer = Dion([model[1].weight])
    with pytest.raises(InvalidInput, match="number 0"):
        optimizer.add_param_group({"params": [model[1].bias]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("mu", 1.5),
        ("weight_decay", -1.0),
        ("rank_fraction", 0.0),
        ("rank_fraction", 1.5),
        ("rank", 0),
        ("eps", 0.0),
    ],
)
def test_a_setting_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=f"{name}: got {value}"):
        Dion([nn.Parameter(torch.zeros(2, 2))], **{name: value})


def train_in_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    model = network()
    optimizer = built(model, torch.distributed.group.WORLD)
    for step in range(5):
        backward(model, rows_of(step)[rank::2])
        for p in model.parameters():
            # What Dion does not take is averaged by whoever trains.
            if p.ndim != 2 and p.grad is not None:
                torch.distributed.all_reduce(p.grad)
                p.grad /= 2
        optimizer.step()
    torch.save({"theta": flat(model)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_step_as_one_does_with_the_averaged_gradient(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path),), nprocs=2)
    model = network()
    optimizer = built(model)
    for step in range(5):
        halves = []
        for rank in range(2):
            backward(model, rows_of(step)[rank::2])
            halves.append([p.grad for p in model.parameters()])
        for p, one, two in zip(model.parameters(), *halves, strict=True):
            assert one is not None
            assert two is not None
            p.grad = (one + two) / 2
        optimizer.step()
    thetas = [torch.load(tmp_path / f"{rank}.pt", weights_only=True)["theta"] for rank in range(2)]
    assert torch.equal(thetas[0], thetas[1])
    assert torch.equal(thetas[0], flat(model))
    assert not torch.equal(flat(model), flat(network()))


@pytest.mark.parametrize("dtype", few(1, [torch.float32, torch.float64]))
@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (32, 64)])
@pytest.mark.parametrize("dead", few(1, ["three rows", "row", "column"]))
@pytest.mark.parametrize("falls", few(1, ["slowly", "at once"]))
def test_all_true_directions_stay_when_gradients_fall_beside_dead_units(
    shape: tuple[int, int], dead: str, falls: str, dtype: torch.dtype
) -> None:
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = Dion([weight], lr=1.0, weight_decay=0.0)
    rows = {"row": 1, "column": 0, "three rows": 3}[dead]
    true = min(shape[0] - rows, shape[1] - (dead == "column"))
    for step, gradient in enumerate(gradients(shape, 160)):
        gradient[:rows] = 0
        if dead == "column":
            gradient[:, 0] = 0
        passed = float(step > 40) if falls == "at once" else min(max((step - 40) / 60, 0), 1)
        weight.grad = (gradient * 1e-5**passed).to(dtype)
        before = weight.detach().clone()
        optimizer.step()
        update = (weight.detach() - before) / (shape[0] / shape[1]) ** 0.5
        # The eps of the unit columns: 1e-8 beside momenta of about 1e-4.
        assert float(update.square().sum()) == pytest.approx(true, rel=2e-3), step


def test_what_has_no_gradients_any_more_fades_out_while_the_others_fall() -> None:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(32, 32, generator=generator))[0][:, :5] for _ in "UV")
    weight = nn.Parameter(torch.zeros(32, 32))
    optimizer = Dion([weight], lr=1.0, weight_decay=0.0)
    for step in range(900):
        inside = torch.randn(5, 5, generator=generator) + 2 * torch.eye(5)
        if step > 300:
            inside[3:], inside[:, 3:] = 0, 0
        weight.grad = U @ inside @ V.T * 1e-5 ** min(step / 600, 1)
        before = weight.detach().clone()
        optimizer.step()
    assert float((weight.detach() - before).square().sum()) == pytest.approx(3, rel=1e-3)


def test_a_state_of_one_number_a_matrix_can_still_be_loaded() -> None:
    weight = nn.Parameter(torch.zeros(4, 3))
    optimizer, _ = started(weight)
    state = optimizer.state_dict()
    state["state"][0]["held"] = torch.tensor(0.0)
    optimizer.load_state_dict(state)
    weight.grad = torch.eye(4, 3)
    optimizer.step()
    assert optimizer.state[weight]["held"].shape == (3,)


@pytest.mark.parametrize(
    ("fraction", "side", "rank"), [(0.07, 100, 7), (0.14, 50, 7), (0.3, 10, 3)]
)
def test_rounding_does_not_raise_the_rank(fraction: float, side: int, rank: int) -> None:
    _, Q = started(nn.Parameter(torch.zeros(side, side)), rank_fraction=fraction)
    assert Q.shape == (side, rank)


def test_a_sparse_gradient_moves_as_its_dense_one() -> None:
    ends = []
    for sparse in (False, True):
        table = nn.Embedding(5, 3, sparse=sparse)
        with torch.no_grad():
            table.weight.copy_(torch.arange(15).reshape(5, 3).sin())
        optimizer = Dion(table.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            table(torch.tensor([1, 3, 3])).square().sum().backward()
            optimizer.step()
        ends.append(table.weight.detach().clone())
    assert torch.equal(*ends)
