"""A subspace of parameter space, such as the dominant subspace S_k: split vectors along it.

S_k = span(u_1, ..., u_k), P_k = sum of u_i u_i^T; the bulk is its orthogonal complement.

Example:
    >>> import torch
    >>> space = Subspace(torch.eye(3)[:, :1], torch.tensor([2.0]))
    >>> dominant, bulk = space.split(torch.tensor([3.0, 4.0, 0.0]))
    >>> dominant.tolist(), bulk.tolist(), round(space.alignment(torch.tensor([3.0, 4.0, 0.0])), 3)
    ([3.0, 0.0, 0.0], [0.0, 4.0, 0.0], 0.6)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import (
    coordinates,
    gram,
    largest,
    length,
    linear_combination,
    norm,
    orthonormalize,
)
from thalweg.operators.symmetric import CountsMatvecs
from thalweg.representation import as_html

Vector = TypeVar("Vector", Tensor, Sequence[Tensor], Mapping[str, Tensor])
"""A flat vector (P,), a block (P, m), or tensors shaped like the parameters (list or dict)."""


@dataclass(frozen=True, repr=False)
class Subspace(CountsMatvecs):
    """An orthonormal basis with the eigenvalues that belong to it, and how far to trust them.

    Attributes:
        basis: (P, k), orthonormal columns, stored column by column.
        eigenvalues: (k,), descending.
        residuals: (k,), norm(A u_i - lambda_i u_i) over what `eigenpairs` divides by, such as
            abs(lambda_1); None where not known, as for a tracked subspace.
        num_matvecs: vectors multiplied by the operator, each over all samples; a fraction where
            some samples alone were asked.
        converged: whether the residuals met the tolerance; None where there was none to meet.
        angles: (k,), the estimated sine of the angle between each u_i and the eigenspace: its
            residual divided by the gap, not by lambda_1; None where not known.
        eigenvalue_errors: (k,), estimated, in units of the eigenvalues; None where not known.

    Raises:
        InvalidInput: the shapes of basis and eigenvalues do not fit. (Whether the columns are
            orthonormal is not checked.)

    Parts of a vector have its dtype, shape and unit; they are computed in that of the basis.

    Source: the projectors of Gur-Ari, Roberts, Dyer 2018 (arXiv 1812.04754). Example: see the
    module.
    """

    basis: Tensor
    eigenvalues: Tensor
    residuals: Tensor | None = None
    num_matvecs: float = 0.0
    converged: bool | None = None
    angles: Tensor | None = None
    eigenvalue_errors: Tensor | None = None

    def __post_init__(self) -> None:
        if self.basis.dim() != 2 or self.eigenvalues.shape != self.basis.shape[1:]:
            raise invalid(
                "subspace",
                f"basis {tuple(self.basis.shape)}, eigenvalues {tuple(self.eigenvalues.shape)}",
                "shapes (P, k) and (k,)",
            )
        # One memory layout for all bases: rounding depends on strides, and a resumed run must
        # round as the undisturbed one does.
        object.__setattr__(self, "basis", self.basis.T.contiguous().T)

    @property
    def k(self) -> int:
        """The dimension of the subspace."""
        return self.basis.shape[1]

    def coordinates(self, vector: Tensor) -> Tensor:
        """The coordinates basis^T v, (k,) or (k, m), of a flat vector (P,) or block (P, m).

        Raises:
            InvalidInput: another length than P.
        """
        if vector.shape[0] != self.basis.shape[0]:
            raise invalid("vector", tuple(vector.shape), f"a length of P = {length(self.basis, 0)}")
        return coordinates(self.basis.T, vector.to(self.basis.dtype))

    def project(self, vector: Vector) -> Vector:
        """The dominant part P_k v, shaped like v.

        Args:
            vector: a flat vector (P,), a block (P, m), or a list or dict of tensors shaped like
                the parameters, in the order of theta.

        Raises:
            InvalidInput: it has not P numbers.
        """
        return _like(vector, self._project_flat(_flat(vector)))

    def reject(self, vector: Vector) -> Vector:
        """The bulk part (I - P_k) v. See `project` for argument and errors."""
        flat = _flat(vector)
        return _like(vector, flat - self._project_flat(flat))

    def split(self, vector: Vector) -> tuple[Vector, Vector]:
        """Both parts, (P_k v, (I - P_k) v), of sum v up to rounding. See `project`."""
        flat = _flat(vector)
        dominant = self._project_flat(flat)
        return _like(vector, dominant), _like(vector, flat - dominant)

    def alignment(self, vector: Vector) -> float:
        """chi_k(v) = norm(P_k v) / norm(v), in [0, 1]; NaN for the zero vector or one with NaN.

        Source: Song, Ahn, Yun 2025 (arXiv 2405.16002), section 2. Gur-Ari et al. 2018 use its
        square under the name f_top.
        """
        flat = _flat(vector).detach()
        size = largest(flat)
        if size == 0:
            return float("nan")
        # Squares of tiny numbers would underflow, in the norm as well.
        flat = flat / size
        return _at_most_one(self.coordinates(flat).norm() / norm(flat))

    def error(self, vector: Vector) -> float:
        """Estimated norm(P_k v - projection) / norm(v); NaN where the angles are not known.

        With e_i the part of the true u_i outside of the subspace, the projection lacks
        sum of e_i <u_i, v> and u_i <e_i, v>. Of e_i the length is known, `angles`, and not the
        direction: the second term is taken at most, as if all of v that is outside lay along the
        worst of them. So it is about right for a v within the subspace, and 2 to 5 times too large
        for one with much outside.
        """
        if self.angles is None:
            return float("nan")
        flat = _flat(vector).detach()
        length = float(norm(flat))
        if length == 0:
            return 0.0
        within = self.coordinates(flat)
        outside = max(length**2 - float(within.square().sum()), 0.0)
        squares = self.angles.square()
        missing = float((within.square() * squares).sum()) + outside * float(squares.max())
        return min(missing**0.5 / length, 1.0)

    def overlap(self, other: Subspace) -> float:
        """Mean squared cosine trace(P P') / k, in [0, 1] (Gur-Ari et al. 2018, arXiv 1812.04754).

        For subspaces of different dimension the smaller one divides.

        Raises:
            InvalidInput: the other subspace is one of another space.
        """
        if other.basis.shape[0] != self.basis.shape[0]:
            raise invalid(
                "other subspace", f"P = {length(other.basis, 0)}", f"P = {length(self.basis, 0)}"
            )
        cosines = gram(self.basis.T, other.basis.to(self.basis).T)
        return _at_most_one(cosines.square().sum() / min(self.k, other.k))

    def to(self, device: torch.device | str) -> Subspace:
        """The same subspace on another device, in the same dtype."""
        known = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device) for name, value in known.items()})

    def __repr__(self) -> str:
        top = ", ".join(f"{value:.4g}" for value in self.eigenvalues[:3].tolist())
        more = ", ..." if self.k > 3 else ""
        residual = (
            "" if self.residuals is None else f", residual<={float(self.residuals.max()):.1e}"
        )
        state = "" if self.converged is None else f", converged={self.converged}"
        return (
            f"Subspace(P={length(self.basis, 0)}, k={self.k}, eigenvalues=[{top}{more}]"
            f"{residual}{state}, num_matvecs={self.num_matvecs:g})"
        )

    def _repr_html_(self) -> str:
        """A table of the eigenvalues, for a notebook."""
        known = {
            "error": self.eigenvalue_errors,
            "residual": self.residuals,
            "angle": self.angles,
        }
        columns = {name: values.tolist() for name, values in known.items() if values is not None}
        rows = [
            [f"lambda_{i + 1}", f"{value:.5g}", *(f"{own[i]:.1e}" for own in columns.values())]
            for i, value in enumerate(self.eigenvalues.tolist())
        ]
        state = {None: "", True: "", False: ", not converged"}[self.converged]
        title = (
            f"Subspace of P = {length(self.basis, 0):,}, k = {self.k}:"
            f" {self.num_matvecs:g} products{state}"
        )
        return as_html((title, ["", "eigenvalue", *columns], rows))

    def _project_flat(self, flat: Tensor) -> Tensor:
        return linear_combination(self.basis.T, self.coordinates(flat)).to(flat.dtype)


def _at_most_one(value: Tensor) -> float:
    # Rounding can exceed 1; `min(1.0, nan)` would turn NaN into perfect alignment.
    return float(value.clamp(max=1.0))


def random_subspace(
    num_parameters: int, k: int, seed: int, *, dtype: torch.dtype = torch.float32
) -> Subspace:
    """k random directions: a baseline, for which a claim about S_k must not hold.

    Uniformly distributed, so that E[chi_k(v)^2] = k / P for every vector v.

    Args:
        num_parameters: P.
        k: dimension, 1 <= k <= P.
        seed: of the directions; the same for every dtype, up to rounding.
        dtype: of the basis.

    Returns:
        A `Subspace` on the CPU, its eigenvalues NaN: the directions are no eigenvectors.

    Raises:
        InvalidInput: k is out of that range.

    Source: the QR factor of a Gaussian matrix is uniform (Stewart 1980, "The efficient generation
    of random orthogonal matrices").

    Example:
        >>> space = random_subspace(1000, 10, seed=0)
        >>> space.k, 0.05 < space.alignment(torch.ones(1000)) < 0.2  # sqrt(k / P) = 0.1
        (10, True)
    """
    if not 1 <= k <= num_parameters:
        raise invalid("k", k, f"an integer from 1 to P = {num_parameters}")
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(num_parameters, k, generator=generator, dtype=torch.float64, device="cpu")
    return Subspace(
        orthonormalize(block).to(dtype), torch.full((k,), float("nan"), dtype=dtype, device="cpu")
    )


def _flat(vector: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
    if isinstance(vector, Tensor):
        return vector
    tensors = list(vector.values()) if isinstance(vector, Mapping) else list(vector)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _like(template: Vector, flat: Tensor) -> Vector:
    if isinstance(template, Tensor):
        return flat
    tensors = list(template.values()) if isinstance(template, Mapping) else list(template)
    parts = flat.split([tensor.numel() for tensor in tensors])
    shaped = [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    if isinstance(template, Mapping):
        return dict(zip(template, shaped, strict=True))
    return shaped
