"""What a Krylov space tells of functions of an operator, and how far it can be trusted.

With V an orthonormal basis of dimension m, A V = V T + Q S, where Q (P, r) is what the products
leave outside. For v = V c:

    f(A) v        ~  V f(T) c                          (Lanczos)
    v^T f(A) v    ~  c^T f(T) c = sum_j w_j f(node_j)  (Gauss quadrature of v's spectral measure)

**The error** is found by making more steps that cost nothing: T is continued as it went on before,
by repeating its last blocks, and f of the longer matrix shows what the next steps would change. A
few patterns are repeated, one way each, and the largest change counts.

**A sharp step** has bounds. For r = 1, continue T so that tau becomes an eigenvalue (a Gauss-Radau
rule with a node at tau):

    T~ = [T, S^T; S, tau + S (T - tau)^-1 S^T]

The weights of T~ above tau are at most v^T 1[A > tau] v, and with that at tau at least that: the
inequalities of Chebyshev, Markov and Stieltjes. They do not hold for r > 1 (of 2,000 random cases
20 broke them), so several vectors that share a space have bounds from as many steps each as there
were block products.

Source: Golub, Meurant 2010, "Matrices, Moments and Quadrature with Applications", chapters 6 and 8.
The continuation of T is that of the recursion method (Haydock 1980), the error estimate our own.

Example:
    >>> import torch
    >>> projected = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> seen = Compression(projected, projected[:0], (), steps=2)
    >>> seen.step_bounds(torch.tensor([0.6, 0.8], dtype=torch.float64), 2.0)
    (0.36, 0.36)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
"""Of eigenvalues (n,), element by element."""

# A node this close to tau, relative to the largest, makes T~ so large that rounding counts.
TOO_NEAR = 1e-7
# What is left of a unit vector beyond rounding.
NOTHING = 1e-14


@dataclass(frozen=True)
class SmoothStep:
    """A smooth step of an operator, times a unit vector.

    Attributes:
        coordinates: f(T) c, (m,): f(A) v in V.
        error: estimated norm of the error of f(A) v.
        mean: v^T f(A) v.
        mean_error: its estimated error.
    """

    coordinates: Tensor
    error: float
    mean: float
    mean_error: float


@dataclass(frozen=True)
class Compression:
    """An operator seen through a Krylov space; float64 on the CPU.

    Attributes:
        projected: T = V^T A V, (m, m).
        coupling: S, (r, m); without rows where the space is invariant.
        continuations: T continued in a few ways, (n, n) each with n > m.
        steps: how many block products made T.
    """

    projected: Tensor
    coupling: Tensor
    continuations: tuple[Tensor, ...]
    steps: int

    def quadrature(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes (m,), ascending, and weights (m,) of the measure of V c, c (m,)."""
        return _quadrature(self.projected, coordinates)

    def step(self, coordinates: Tensor, threshold: float, width: float) -> SmoothStep:
        """f(A) v and v^T f(A) v for the logistic step f at tau, v = V c.

        Args:
            coordinates: c, (m,), of norm 1.
            threshold: tau > 0, in units of the operator.
            width: of the step, in units of tau.
        """
        function = smooth_step(threshold, width)
        inside = _applied(self.projected, function, coordinates)
        mean = float(coordinates @ inside)
        moved = turned = 0.0
        for longer in self.continuations:
            later = _applied(longer, function, coordinates)
            moved = max(moved, float((later - _padded(inside, longer)).norm()))
            turned = max(turned, abs(float(later[: len(coordinates)] @ coordinates) - mean))
        # What T's continuations know nothing of. The mean's error is between that of f(A) v and its
        # square; where the continuations agree on the mean by chance, say half-way.
        unseen = self._unseen(coordinates, threshold)
        error = max(moved, unseen**0.5)
        return SmoothStep(inside, error, mean, max(turned, error**1.5 / 2))

    def step_bounds(self, coordinates: Tensor, threshold: float) -> tuple[float, float]:
        """The least and the most that v^T 1[A > tau] v can be, v = V c, c (m,) of norm 1."""
        if len(self.coupling) > 1:
            return self._alone(coordinates).step_bounds(coordinates.new_ones(1), threshold)
        values = torch.linalg.eigvalsh(self.projected)
        near = TOO_NEAR * max(float(values.abs().max()), abs(threshold))
        # A bound at a higher tau is one from below at this tau, and the other way round.
        least, _ = self._weights(coordinates, _clear_of(values, threshold, near))
        _, below = self._weights(coordinates, _clear_of(values, threshold, -near))
        most = 1 - below
        return min(least, 1.0), min(max(most, least), 1.0)

    def _unseen(self, coordinates: Tensor, threshold: float) -> float:
        """The most of v's measure that may lie on a side of tau where no node is; else 0."""
        nodes, _ = self.quadrature(coordinates)
        if bool((nodes > threshold).any()) and bool((nodes <= threshold).any()):
            return 0.0
        least, most = self.step_bounds(coordinates, threshold)
        return most - least

    def _weights(self, coordinates: Tensor, threshold: float) -> tuple[float, float]:
        """The weights of T~ above and below tau, without that of the node at tau."""
        if len(self.coupling) == 0:
            nodes, weights = self.quadrature(coordinates)
        else:
            values, vectors = torch.linalg.eigh(self.projected)
            turned = self.coupling @ vectors
            corner = threshold + turned / (values - threshold) @ turned.T
            nodes, weights = _quadrature(
                _bordered(self.projected, self.coupling, corner[0]), coordinates
            )
            weights[(nodes - threshold).abs().argmin()] = 0.0
        above, below = weights[nodes > threshold], weights[nodes < threshold]
        return float(above.sum()), float(below.sum())

    def _alone(self, coordinates: Tensor) -> Compression:
        """What the steps of one vector alone would have shown: T is tridiagonal then, r is 1.

        Its Lanczos vectors are in the space, so the recurrence runs in coordinates.
        """
        whole = _bordered(self.projected, self.coupling, coordinates.new_zeros(len(self.coupling)))
        basis = [_padded(coordinates / coordinates.norm(), whole)]
        alpha, beta = [], []
        for _ in range(self.steps):
            image = whole @ basis[-1]
            alpha.append(image @ basis[-1])
            known = torch.stack(basis)
            for _ in range(2):
                image = image - known.T @ (known @ image)
            beta.append(image.norm())
            if float(beta[-1]) <= NOTHING * float(whole.norm()):
                break
            basis.append(image / beta[-1])
        n = len(alpha)
        beside = torch.stack(beta)
        projected = torch.diag(torch.stack(alpha))
        projected += torch.diag(beside[: n - 1], 1) + torch.diag(beside[: n - 1], -1)
        coupling = projected.new_zeros(len(basis) - n, n)
        coupling[:, n - 1 :] = beside[n - 1]
        return Compression(projected, coupling, (), n)


def smooth_step(threshold: float, width: float) -> Function:
    """The logistic step 1 / (1 + exp(-(lambda - tau) / (width tau))) as a function of lambda."""
    return lambda values: torch.sigmoid((values - threshold) / (width * threshold))


def continued(projected: Tensor, coupling: Tensor, pattern: int, steps: int) -> Tensor:
    """T continued for some steps by repeating its last blocks, `pattern` of them.

    Args:
        projected, coupling: T (m, m) and S (r, m). The last `pattern` blocks of T are r wide.
        pattern: at least 1.
        steps: blocks to append.
    """
    m, r = len(projected), len(coupling)
    longer = projected.new_zeros(m + r * steps, m + r * steps)
    longer[:m, :m] = projected
    longer[m : m + r, :m], longer[:m, m : m + r] = coupling, coupling.T
    # Row block by row block, T with the coupling below it; the first of the pattern comes again
    # after the last.
    rows = torch.cat([projected, coupling])
    for step in range(steps):
        here, copied = m + r * step, m + r * (step % pattern - pattern)
        own = slice(here, here + r)
        longer[own, own] = rows[copied : copied + r, copied : copied + r]
        if step + 1 < steps:
            below = rows[copied + r : copied + 2 * r, copied : copied + r]
            longer[here + r : here + 2 * r, own] = below
            longer[own, here + r : here + 2 * r] = below.T
    return longer


def _quadrature(matrix: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, (vectors.T @ _padded(coordinates, matrix)).square()


def _applied(matrix: Tensor, function: Function, coordinates: Tensor) -> Tensor:
    """f of a symmetric matrix (n, n), times coordinates that zeros follow, (n,)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (function(values) * (vectors.T @ _padded(coordinates, matrix)))


def _bordered(projected: Tensor, coupling: Tensor, corner: Tensor) -> Tensor:
    """[T, S^T; S, diag(corner)], a corner (r,)."""
    above = torch.cat([projected, coupling.T], dim=1)
    return torch.cat([above, torch.cat([coupling, torch.diag(corner)], dim=1)])


def _clear_of(values: Tensor, threshold: float, step: float) -> float:
    """The threshold, or where a value is too near, the next one by some steps that is clear."""
    moved = threshold
    while bool(((values - moved).abs() < abs(step)).any()):
        moved += step
    return moved


def _padded(coordinates: Tensor, longer: Tensor) -> Tensor:
    return torch.nn.functional.pad(coordinates, (0, len(longer) - len(coordinates)))
