"""What is trained: data sets, models, losses, and the problem that a spec makes of them.

A spec names a data set, a model and a loss with their settings; `build_problem` makes a `Problem`
of them: an initialized model, a loss, and samples as tensors. Importing this does not import
PyTorch.

A user's own problem takes a few lines, either way:

1. By hand, from tensors:

    >>> import torch
    >>> from thalweg.problems import Problem
    >>> inputs, targets = torch.randn(64, 5), torch.randn(64, 2)
    >>> mine = Problem(
    ...     name="linear", model=torch.nn.Linear(5, 2), train=(inputs, targets),
    ...     loss=lambda output, target: 0.5 * (output - target).square().sum(1).mean(),
    ... )
    >>> mine.num_samples
    64

2. By name, in a module that is given as `--plugin my_problems.py`; specs then say
   `data = {name = "two-moons", noise = 0.2}`:

    >>> import numpy as np
    >>> from thalweg.problems import Samples
    >>> from thalweg.settings import Settings
    >>> from thalweg.registry import datasets
    >>> @datasets.register("two-moons")
    ... class TwoMoons(Settings):
    ...     noise: float = 0.1
    ...     def build(self) -> Samples:
    ...         angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    ...         upper = angle < np.pi
    ...         points = np.stack([np.cos(angle) + ~upper, np.sin(angle) + 0.5 * ~upper], axis=1)
    ...         noise = np.random.default_rng(0).normal(size=points.shape)
    ...         return Samples(points + self.noise * noise, upper.astype(int), num_classes=2)
"""

from __future__ import annotations

from thalweg.errors import require_extra

require_extra("lab", "pydantic", "pooch")

from thalweg.problems import given, losses, quadratic, valley  # noqa: E402
from thalweg.problems.data import digits, images, sst2, text  # noqa: E402
from thalweg.problems.data.dataset import InputShape, Samples  # noqa: E402
from thalweg.problems.models import cnn, language_model, mlp, resnet, transformer, vgg  # noqa: E402
from thalweg.problems.problem import Loss, Problem, build_problem  # noqa: E402

__all__ = ["InputShape", "Loss", "Problem", "Samples", "build_problem"]

# Imported for the names that they register.
_REGISTERED = (digits, given, images, sst2, text, quadratic, valley)
_REGISTERED_MODELS = (cnn, language_model, mlp, resnet, transformer, vgg, losses)
