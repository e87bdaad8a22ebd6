"""Curvature in the metric of an optimizer: D^-1/2 A D^-1/2 for a positive diagonal D, as Adam's.

With W the top eigenvectors of D^-1/2 A D^-1/2, orthonormal in the scaled space, the projections on
the dominant subspace are

    of an update delta:  D^-1/2 W W^T D^1/2 delta       of a gradient g:  D^1/2 W W^T D^-1/2 g

and <delta, g> = <dominant delta, dominant g> + <bulk delta, bulk g>: the split is orthogonal in the
metric.

Source: Cohen et al. 2022 (arXiv 2207.14484) for the preconditioned Hessian of adaptive methods.

Example:
    >>> import torch
    >>> from thalweg.curvature.operators import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.tensor([4.0, 9.0])))
    >>> (Preconditioned(operator, torch.full((2,), 4.0)) @ torch.ones(2)).tolist()
    [1.0, 2.25]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.curvature.operators import OperatorAround, SymmetricOperator, rows_of
from thalweg.curvature.subspace import Subspace
from thalweg.errors import invalid


class Preconditioned(OperatorAround):
    """D^-1/2 (A + s I) D^-1/2 of any symmetric operator A and a positive diagonal D.

    Args:
        operator: A.
        diagonal: D, (P,), such as sqrt(v) + eps of Adam.
        shift: s, such as a weight decay that is added to the gradient.

    Raises:
        InvalidInput: another shape or device than the operator's; an element that is not positive
            or not finite.

    In units of A over those of D, in the dtype of A. Source and example: see the module.
    """

    def __init__(
        self, operator: SymmetricOperator, diagonal: Tensor, *, shift: float = 0.0
    ) -> None:
        self.operator = operator
        self.shift = shift
        self._scale = _inverse_root(diagonal, operator).to(operator.dtype)

    @property
    def gradient(self) -> Tensor | None:
        """D^-1/2 g of the operator's gradient g; None where it has none."""
        gradient = getattr(self.operator, "gradient", None)
        return None if gradient is None else self._scale * gradient

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with (P,) or the columns of (P, k); errors are those of A."""
        scale = self._scale
        scaled = rows_of(vectors, self).mul(scale).T
        image = self.operator @ scaled
        if self.shift:
            image = image + self.shift * scaled
        image = scale[:, None] * image
        return image[:, 0] if vectors.dim() == 1 else image


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
        _checked(self.diagonal, self.scaled.basis.shape[0], self.scaled.basis.device)

    def split_update(self, update: Tensor) -> tuple[Tensor, Tensor]:
        """Dominant and bulk part of an update (P,), of sum `update`.

        Raises:
            InvalidInput: another length than P.
        """
        root = self.diagonal.sqrt()
        dominant = self.scaled.project(root * update) / root
        return dominant, update - dominant

    def split_gradient(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Dominant and bulk part of a gradient (P,), of sum `gradient`.

        Raises:
            InvalidInput: another length than P.
        """
        root = self.diagonal.sqrt()
        dominant = root * self.scaled.project(gradient / root)
        return dominant, gradient - dominant

    def alignment_update(self, update: Tensor) -> float:
        """chi of an update: norm(W^T D^1/2 delta) / norm(D^1/2 delta), in [0, 1]."""
        return self.scaled.alignment(self.diagonal.sqrt() * update)

    def alignment_gradient(self, gradient: Tensor) -> float:
        """chi of a gradient: norm(W^T D^-1/2 g) / norm(D^-1/2 g), in [0, 1]."""
        return self.scaled.alignment(gradient / self.diagonal.sqrt())


def _inverse_root(diagonal: Tensor, operator: SymmetricOperator) -> Tensor:
    _checked(diagonal, operator.shape[0], operator.device)
    return diagonal.rsqrt()


def _checked(diagonal: Tensor, size: int, device: torch.device) -> None:
    if diagonal.shape != (size,):
        raise invalid("diagonal", tuple(diagonal.shape), f"({size},)")
    if diagonal.device != device:
        raise invalid("diagonal", f"on {diagonal.device}", f"on {device}, like the operator")
    # `not >` is true of NaN as well.
    unfit = torch.nonzero(~((diagonal > 0) & torch.isfinite(diagonal)))
    if len(unfit):
        index = int(unfit[0])
        given = f"{float(diagonal[index]):g} at {index}"
        raise invalid("diagonal", given, "positive finite numbers", "add the optimizer's eps")
