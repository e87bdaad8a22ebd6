"""Dominant subspace in the metric of a positive diagonal D, as Adam's: two ways to split.

With W the top eigenvectors of D^-1/2 A D^-1/2, an update delta has the dominant part
D^-1/2 W W^T D^1/2 delta, a gradient g has D^1/2 W W^T D^-1/2 g.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thalweg.linalg import length
from thalweg.operators.preconditioned import refuse_unfit_diagonal
from thalweg.spectrum.subspace import Subspace


@dataclass(frozen=True)
class MetricSubspace:
    """The dominant subspace in the metric of D: splits updates and gradients, each in its own way.

    Attributes:
        scaled: W with its eigenvalues, the top eigenpairs of `Preconditioned`.
        diagonal: D, (P,), positive.

    Raises:
        InvalidInput: a diagonal of another shape or device, or not positive.

    Source: the formulas of the module; with D = I it is the split of `Subspace`.

    Example:
        >>> from thalweg.spectrum.subspace import Subspace
        >>> import torch
        >>> scaled = Subspace(torch.tensor([[0.6], [0.8]]), torch.tensor([9.0]))
        >>> space = MetricSubspace(scaled, torch.tensor([4.0, 1.0]))
        >>> update, gradient = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
        >>> parts = zip(space.split_update(update), space.split_gradient(gradient))
        >>> round(sum(float(delta @ g) for delta, g in parts), 4)  # orthogonal: <delta, g>
        1.0
    """

    scaled: Subspace
    diagonal: Tensor

    def __post_init__(self) -> None:
        refuse_unfit_diagonal(self.diagonal, length(self.scaled.basis, 0), self.scaled.basis.device)

    def split_update(self, update: Tensor) -> tuple[Tensor, Tensor]:
        """Dominant and bulk part of an update (P,), of sum `update`.

        Raises:
            InvalidInput: another length than P.
        """
        scaled = to_metric(update, self.diagonal)
        dominant = from_metric(self.scaled.project(scaled), self.diagonal)
        return dominant, update - dominant

    def split_gradient(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Dominant and bulk part of a gradient (P,), of sum `gradient`.

        Raises:
            InvalidInput: another length than P.
        """
        root = self.diagonal.sqrt()
        dominant = root * self.scaled.project(gradient / root)
        return dominant, gradient - dominant

    def error_update(self, update: Tensor) -> float:
        """Estimated error of the dominant part of an update (P,), in the norm of the metric.

        Relative to norm(D^1/2 delta); NaN where the angles of `scaled` are not known.
        """
        return self.scaled.error(to_metric(update, self.diagonal))

    def error_gradient(self, gradient: Tensor) -> float:
        """The same of a gradient (P,), relative to norm(D^-1/2 g)."""
        return self.scaled.error(gradient / self.diagonal.sqrt())

    def alignment_update(self, update: Tensor) -> float:
        """chi of an update: norm(W^T D^1/2 delta) / norm(D^1/2 delta), in [0, 1]."""
        return self.scaled.alignment(to_metric(update, self.diagonal))

    def alignment_gradient(self, gradient: Tensor) -> float:
        """chi of a gradient: norm(W^T D^-1/2 g) / norm(D^-1/2 g), in [0, 1]."""
        return self.scaled.alignment(gradient / self.diagonal.sqrt())


def to_metric(update: Tensor, diagonal: Tensor) -> Tensor:
    """D^1/2 delta: an update (P,) in the coordinates D^1/2 theta, where the metric is Euclidean."""
    return diagonal.sqrt() * update


def from_metric(scaled: Tensor, diagonal: Tensor) -> Tensor:
    """D^-1/2 of an update (P,) in the coordinates D^1/2 theta: that update of theta."""
    return scaled / diagonal.sqrt()
