"""A loss has to be a mean over something that can be counted, or chunks decide about its value."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import eigenpairs
from thalweg.tracking.tracker import SubspaceTracker

CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 0.1])


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, 4, generator=generator),
        torch.randint(0, 3, (count,), generator=generator),
    )


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class Centred(nn.Module):
    """Its samples see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs - inputs.mean(0))


def _sum(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o, t, reduction="sum")


def _class_weights(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o, t, weight=CLASS_WEIGHTS.to(o.dtype))


def _root(o: Tensor, t: Tensor) -> Tensor:
    return (o.sum(1) - t).square().mean().sqrt()


def _contrastive(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o @ o.T, torch.arange(len(o)))


NO_MEANS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "sum": (model, _sum, "it is a sum: divide it"),
    "class weights": (model, _class_weights, "pass batch_weight="),
    "root of a mean": (model, _root, "pass batch_weight="),
    "contrastive": (model, _contrastive, r"chunk_size=None"),
    "model that centres a batch": (Centred, nn.CrossEntropyLoss(), r"see one another"),
}


@pytest.mark.parametrize("name", NO_MEANS)
def test_what_is_no_mean_is_right_in_one_chunk_and_refused_in_several(name: str) -> None:
    build, loss, hint = NO_MEANS[name]
    inputs, targets = data()
    plain = build()
    whole = Objective(plain, loss, (inputs, targets))
    assert torch.allclose(whole.value(), loss(plain(inputs), targets))
    assert whole.gradient().isfinite().all()
    _ = eigenpairs(whole, 1)
    for size in (7, 2, 1):
        with pytest.raises(InvalidInput, match=hint):
            Objective(plain, loss, (inputs, targets), chunk_size=size).value()
    # A part of the samples, single samples, batches.
    with pytest.raises(InvalidInput, match=hint):
        whole.gradient(samples=torch.arange(5))
    with pytest.raises(InvalidInput, match=hint):
        _ = GradientCovariance(whole) @ torch.ones(whole.num_parameters)
    halves = [(inputs[:12], targets[:12]), (inputs[12:], targets[12:, None][:, 0].clone())]
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    for given in (halves, loader):
        with pytest.raises(InvalidInput, match=hint):
            Objective(plain, loss, given, chunk_size=12).value()
    assert Objective(plain, loss, (inputs, targets), chunk_size=7, check=False).value().isfinite()


def test_a_tracker_of_a_sum_is_refused() -> None:
    tracker = SubspaceTracker(Objective(model(), _sum, data(300)), 2)

    def followed() -> None:
        for _ in range(3):
            tracker.update()

    with pytest.raises(InvalidInput, match="it is a sum"):
        followed()


@pytest.mark.parametrize("size", [24, 7, 1])
def test_weights_of_ones_own_are_right_where_batch_weight_gives_them(size: int) -> None:
    inputs, targets = data()
    plain = model()
    expected = _class_weights(plain(inputs), targets)
    weigh = lambda batch: CLASS_WEIGHTS[batch[1]].sum()  # noqa: E731
    given = Objective(plain, _class_weights, (inputs, targets), chunk_size=size, batch_weight=weigh)
    assert torch.allclose(given.value(), expected)
    if size < 24:
        wrong = lambda batch: len(batch[1])  # noqa: E731
        with pytest.raises(InvalidInput, match="batch_weight is to give"):
            Objective(
                plain, _class_weights, (inputs, targets), chunk_size=size, batch_weight=wrong
            ).value()


MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda o, t: F.cross_entropy(o, t),
    "with a penalty on outputs": lambda o, t: F.cross_entropy(o, t) + o.square().mean(),
    "with a constant": lambda o, t: F.cross_entropy(o, t) + 3,
    "almost zero": lambda o, t: 1e-7 * F.cross_entropy(o, t),
    "negative": lambda o, t: -F.cross_entropy(o, t),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_is_the_same_in_chunks_of_any_size_and_weighs_by_samples(name: str) -> None:
    inputs, targets = data()
    plain = model()
    for size in (24, 7, 1):
        loss = Objective(plain, MEANS[name], (inputs, targets), chunk_size=size)
        assert torch.allclose(loss.value(), MEANS[name](plain(inputs), targets), rtol=1e-5, atol=0)
        assert loss.batch_weight is None


@pytest.mark.parametrize("ignored", [-100, 0, -1])
@pytest.mark.parametrize("size", [24, 8, 1])
def test_ignored_targets_are_found(ignored: int, size: int) -> None:
    inputs, targets = data()
    targets[:9] = ignored  # a whole chunk, and one of the next
    loss = lambda o, t: F.cross_entropy(o, t, ignore_index=ignored)  # noqa: E731
    plain = model()
    given = Objective(plain, loss, (inputs, targets), chunk_size=size)
    expected = loss(plain(inputs), targets)
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(expected, list(plain.parameters()))]
    )
    assert torch.allclose(given.value(), expected)
    assert torch.allclose(given.gradient(), gradient, atol=1e-6)


def test_a_single_ignored_target_among_many_samples_is_found() -> None:
    inputs, targets = data(900)
    targets[777] = -100
    plain = model()
    given = Objective(plain, lambda o, t: F.cross_entropy(o, t), (inputs, targets), chunk_size=100)
    assert torch.allclose(given.value(), F.cross_entropy(plain(inputs), targets), rtol=1e-6)
    assert given.batch_weight is not None


class Language(nn.Module):
    """A model with a loss of its own: the next token's, or the same token's."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shifted = shifted
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.embed(input_ids)))
        used, wanted = (logits[:, :-1], labels[:, 1:]) if self.shifted else (logits, labels)
        loss = F.cross_entropy(used.reshape(-1, 7), wanted.reshape(-1))
        return SimpleNamespace(loss=loss, logits=logits)


def texts() -> dict[str, Tensor]:
    ids = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:3, 3:] = -100
    labels[4, 0] = -100  # counts where labels are not shifted alone
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("size", few(1, [2, 1]))
def test_padded_labels_of_a_model_with_its_own_loss_are_found(shifted: bool, size: int) -> None:
    language = Language(shifted)
    count = sum(p.numel() for p in language.parameters())
    matrices = [
        Hessian(Objective(language, None, texts(), chunk_size=n)) @ torch.eye(count).double()
        for n in (6, size)
    ]
    assert torch.allclose(*matrices, atol=1e-12)
    covariance = GradientCovariance(Objective(language, None, texts()))
    mean = covariance @ torch.ones(count).double()
    assert mean.isfinite().all()
    assert torch.allclose(covariance.gradient, Objective(language, None, texts()).gradient())


def test_batches_of_unequal_lengths_without_an_ignored_label_need_a_weight() -> None:
    short = {"input_ids": torch.ones(2, 3).long(), "labels": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    batches = [texts(), short]
    whole = [{k: v.clamp(0) for k, v in batch.items()} for batch in batches]
    with pytest.raises(InvalidInput, match=r"samples or over targets.*batch_weight=lambda"):
        Objective(Language(True), None, whole).value()
    # Where one batch tells, none is needed.
    language = Language(True)
    found = Objective(language, None, batches).value()
    losses = [language(**batch).loss for batch in batches]
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    expected = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
    assert torch.allclose(found, expected)


def test_a_model_that_takes_no_small_batch_is_not_judged() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, inputs: Tensor) -> Tensor:
            assert len(inputs) == 12
            return self.inner(inputs)

    inputs, targets = data()
    pairs = Pairs()
    found = Objective(pairs, lambda o, t: F.cross_entropy(o, t), (inputs, targets), chunk_size=12)
    assert torch.allclose(found.value(), F.cross_entropy(pairs.inner(inputs), targets))


def test_lower_precision_is_no_disagreement() -> None:
    inputs, targets = data(64)
    loss = lambda o, t: F.cross_entropy(o, t)  # noqa: E731
    options: dict[str, Any] = {"chunk_size": 8, "forward_dtype": torch.bfloat16}
    assert Objective(model(), loss, (inputs, targets), **options).value().isfinite()
