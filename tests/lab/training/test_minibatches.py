from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.lab.training.step import minibatch


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(-(2**40), 2**40),
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 80),
)
def test_each_epoch_covers_each_sample_once(seed: int, num_samples: int, batch_size: int) -> None:
    steps = 3 * num_samples // batch_size + 1
    batches = [minibatch(seed, step, batch_size, num_samples) for step in range(steps)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
    for epoch in torch.cat(batches).split(num_samples):
        if len(epoch) == num_samples:
            assert epoch.sort().values.tolist() == list(range(num_samples))
        else:
            assert len(set(epoch.tolist())) == len(epoch)


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    forwards = [minibatch(3, step, 7, 50) for step in range(40)]
    torch.manual_seed(1)
    torch.rand(5)
    backwards = [minibatch(3, step, 7, 50) for step in reversed(range(40))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    state = torch.get_rng_state()
    minibatch(4, 0, 7, 50)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [minibatch(seed, step, 25, 50).tolist() for seed in (0, 1) for step in (0, 2, 4)]
    assert len({tuple(order) for order in orders}) == 6


def test_a_batch_that_is_changed_does_not_change_the_next() -> None:
    first = minibatch(0, 0, 5, 20)
    kept = first.clone()
    first.zero_()
    assert torch.equal(minibatch(0, 0, 5, 20), kept)


@pytest.mark.parametrize("step", [0, 1, 17])
def test_the_full_batch_is_all_samples_in_order(step: int) -> None:
    assert minibatch(0, step, 12, 12).tolist() == list(range(12))
