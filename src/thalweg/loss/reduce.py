"""Where sums over samples are closed: partial sums of one process become those of all.

A mean over N samples is a sum of parts, each weighted by its fraction of the whole. `Objective`
sums over the chunks of the samples that it holds, and gives every such sum (values, gradients,
products, weights) to its `Reduction`, here and nowhere else. In one process nothing is left to add;
where the samples are divided among processes, another class with these members adds the parts.

Example:
    >>> import torch
    >>> reduction = Reduction()
    >>> reduction.sum(torch.ones(2)).tolist(), reduction.total(3.0), reduction.place(5)
    ([1.0, 1.0], 3.0, (0, 5))
"""

from __future__ import annotations

from torch import Tensor


class Reduction:
    """Closes sums in one process, which holds all samples. Example: see the module.

    A class for many processes overrides all three. They call each in the same order.
    """

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of the processes' tensors of one shape; it may overwrite the one given."""
        return partial

    def total(self, partial: float) -> float:
        """The sum of the processes' numbers."""
        return partial

    def place(self, count: int) -> tuple[int, int]:
        """Where the `count` samples of this process stand among all.

        Returns:
            How many samples come before them, and the number N of all. Indices of samples count
            through all processes.
        """
        return 0, count
