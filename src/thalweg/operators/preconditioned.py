"""Curvature in the metric of an optimizer: D^-1/2 A D^-1/2 for a positive diagonal D, as Adam's.

With W the top eigenvectors of D^-1/2 A D^-1/2, orthonormal in the scaled space, the projections on
the dominant subspace are

    of an update delta:  D^-1/2 W W^T D^1/2 delta       of a gradient g:  D^1/2 W W^T D^-1/2 g

and <delta, g> = <dominant delta, dominant g> + <bulk delta, bulk g>: the split is orthogonal in the
metric.

Source: Cohen et al. 2022 (arXiv 2207.14484) for the preconditioned Hessian of adaptive methods.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.tensor([4.0, 9.0])))
    >>> (Preconditioned(operator, torch.full((2,), 4.0)) @ torch.ones(2)).tolist()
    [1.0, 2.25]
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import anywhere, length, norm
from thalweg.operators.symmetric import (
    OperatorAround,
    SymmetricOperator,
    product_with_error,
    rows_of,
)
from thalweg.sharding import plain


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
        return self.product_with_error(vectors)[0]

    def product_with_error(
        self, vectors: Tensor, *, measured: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `SymmetricOperator`. Errors count as scaled as the products are."""
        scale = self._scale
        scaled = rows_of(vectors, self).mul(scale).T
        inside, errors = product_with_error(self.operator, scaled, measured=measured)
        image = inside + self.shift * scaled if self.shift else inside
        image = scale[:, None] * image
        if errors is not None:
            tiny = torch.finfo(image.dtype).tiny
            ratio = norm(scale[:, None] * inside, dim=0) / norm(inside, dim=0).clamp(min=tiny)
            errors = errors * ratio.to(errors)
        return image[:, 0] if vectors.dim() == 1 else image, errors


def _inverse_root(diagonal: Tensor, operator: SymmetricOperator) -> Tensor:
    refuse_unfit_diagonal(diagonal, operator.shape[0], operator.device)
    return diagonal.rsqrt()


def refuse_unfit_diagonal(diagonal: Tensor, size: int, device: torch.device) -> None:
    """Refuse a diagonal (P,) that is no metric.

    Raises:
        InvalidInput: another shape or device, or an element that is not positive and finite.
    """
    if diagonal.dim() != 1 or length(diagonal) != size:
        raise invalid("diagonal", tuple(diagonal.shape), f"({size},)")
    if diagonal.device != device:
        raise invalid("diagonal", f"on {diagonal.device}", f"on {device}, like the operator")
    # `not >` is true of NaN as well.
    unfit = ~((diagonal > 0) & torch.isfinite(diagonal))
    if anywhere(unfit):
        own, here = plain(diagonal), torch.nonzero(plain(unfit))
        given = f"{float(own[here[0]]):g} at {int(here[0])}" if len(here) else "one elsewhere"
        raise invalid("diagonal", given, "positive finite numbers", "add the optimizer's eps")
