from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from thalweg.measure.watcher import undisturbed

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def seed() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def test_all_three_generators_go_on_where_they_were() -> None:
    seed()
    expected = [draw(), draw()]
    seed()
    found = [draw()]
    with undisturbed(CPU):
        draw()
        seed()
    found.append(draw())
    assert found == expected


def test_they_do_so_after_an_exception() -> None:
    seed()
    expected = draw()
    seed()
    with pytest.raises(ZeroDivisionError), undisturbed(CPU):
        _ = 1 / (draw()[0] * 0)
    assert draw() == expected


def test_autocast_of_the_user_ends_at_the_block_and_goes_on_behind_it() -> None:
    matrix = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with undisturbed(CPU):
            assert (matrix @ matrix).dtype == torch.float32
        assert (matrix @ matrix).dtype == torch.bfloat16
