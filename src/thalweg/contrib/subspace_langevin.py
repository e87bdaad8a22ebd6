"""Subspace Langevin Monte Carlo: samples from exp(-V), along a block of eigenvectors a step.

A symmetric positive preconditioner A is cut into blocks of its eigenvectors, block j with projector
P_j and probability p_j. A step draws one of them and is

    B = P_j A P_j / p_j,   x <- x - h B grad V(x) + sqrt(2 h) B^(1/2) xi,   xi standard normal

Why it is divided by p_j: then E[B] = A whatever the probabilities, so that for small h the chain
follows the preconditioned Langevin diffusion dX = -A grad V dt + sqrt(2 A) dW at its own speed, and
h means the same for every choice of blocks. (As in random-coordinate Langevin of Ding, Li, Lu,
Wright 2021. How the paper itself rescales could not be verified.) One block of everything is
preconditioned Langevin, A = I plain Langevin, blocks of one coordinate random-coordinate Langevin.

On a Gaussian of covariance S the chain is linear: its stationary covariance C, not quite S, solves
C = E[(I - h B S^-1) C (I - h B S^-1)^T] + 2 h E[B]. The tests hold it to that.

Source: Maunu, Yao 2024 (arXiv 2412.13928); the update and its special cases.

Example:
    >>> import torch
    >>> covariance = torch.tensor([[4.0, 1.0], [1.0, 0.5]])
    >>> precision, x = torch.linalg.inv(covariance), torch.nn.Parameter(torch.zeros(2))
    >>> blocks = eigenvector_blocks(covariance, size=1)
    >>> sampler = SubspaceLangevin([x], lr=0.1, blocks=blocks, seed=0)
    >>> samples = []
    >>> for step in range(2000):
    ...     sampler.zero_grad()
    ...     (0.5 * x @ precision @ x).backward()  # V, not a mean over samples
    ...     sampler.step()
    ...     samples.append(x.detach().clone())
    >>> 2 < float(torch.stack(samples)[:, 0].var()) < 8
    True
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import InvalidInput, invalid
from thalweg.optim.copying import Copyable
from thalweg.spectrum.subspace import Subspace


@dataclass(frozen=True)
class Block:
    """A block of eigenvectors of A, and how probably it is drawn.

    Attributes:
        size: how many eigenvectors.
        probability: p > 0; those of all blocks sum to 1.
        apply: `apply(v, power)` gives P A^power v for v (P,), P the projector on the block.

    Example:
        >>> first, second = coordinate_blocks(4, size=2)
        >>> first.apply(torch.ones(4), 0.5).tolist(), first.probability
        ([1.0, 1.0, 0.0, 0.0], 0.5)
    """

    size: int
    probability: float
    apply: Callable[[Tensor, float], Tensor]


Blocks = Sequence[Block]
BlocksAt = Callable[[Tensor], Blocks]
"""Gives the blocks at x (P,): A varies along the chain."""


class SubspaceLangevin(Copyable):
    """Samples from exp(-V / temperature); after `V.backward()` each `step` is one of the chain.

    V is a negative log density: of a posterior, the *sum* of the losses over all samples minus the
    log of the prior, not a mean. All parameters together are x.

    Args:
        params: parameters, in one group.
        lr: h > 0.
        blocks: of A; or a function of x (P,) that gives them at each step. (Where A depends on x,
            an exact sampler has a drift div A(x) besides, which is left out here. It vanishes
            where no entry of a diagonal A depends on its own coordinate, as in a funnel that is
            preconditioned by its width; else choose an A that varies slowly, or hold it after a
            while.) None for A = I, one block: plain Langevin.
        temperature: >= 0; scales the noise by its root. 0 is preconditioned block descent.
        seed: of the blocks drawn and of the noise, which are drawn on the CPU.

    Attributes:
        drawn: the number of the block of the last step; None before it.

    Raises:
        InvalidInput: lr or temperature out of range, several groups, blocks whose probabilities
            are not positive with sum 1.

    The generator's state is part of `state_dict`: a restored chain continues bit for bit. Source,
    example: see the module.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        blocks: Blocks | BlocksAt | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not lr > 0:
            raise invalid("lr", lr, "a number > 0")
        if not temperature >= 0:
            raise invalid("temperature", temperature, "a number >= 0")
        super().__init__(params, {"lr": lr, "temperature": temperature})
        size = sum(p.numel() for p in self._parameters)
        self._blocks = coordinate_blocks(size, size) if blocks is None else blocks
        self._bounds = [] if callable(self._blocks) else _upper_bounds(self._blocks)
        self._generator = torch.Generator().manual_seed(seed)
        self.drawn: int | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once there is one, which the constructor adds.

        Raises:
            InvalidInput: always, but for the first group.
        """
        if self.param_groups:
            given = f"{len(self.param_groups) + 1} groups of parameters"
            raise invalid("params", given, "one", "A weighs parameters against each other")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step; returns the value of `closure`, if one is given.

        Raises:
            InvalidInput: a parameter has no gradient; unfit blocks from a function.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        x, gradient = self._flat()
        block = self._draw(x)
        settings = self.param_groups[0]
        rate = settings["lr"] / block.probability
        update = block.apply(gradient, 1.0).mul_(-rate)
        if settings["temperature"]:
            noise = torch.randn(x.shape, generator=self._generator, dtype=x.dtype).to(x.device)
            scale = math.sqrt(2 * rate * settings["temperature"])
            update.add_(block.apply(noise, 0.5), alpha=scale)
        sizes = [p.numel() for p in self._parameters]
        for parameter, part in zip(self._parameters, update.split(sizes), strict=True):
            parameter.add_(part.view_as(parameter))
        return value

    def state_dict(self) -> dict[str, Any]:
        """Settings, and the state of the generator; the blocks are given anew."""
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InvalidInput: it is not that of a `SubspaceLangevin`.
        """
        if "generator" not in state_dict:
            given = ", ".join(state_dict)
            raise invalid("state_dict", given, "one of a SubspaceLangevin, with 'generator'")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "generator"})
        self._generator.set_state(state_dict["generator"].cpu())

    def state_snapshot(self) -> Callable[[], None]:
        """Note where the generator is; returns a function that puts it back."""
        generator, drawn = self._generator.get_state(), self.drawn

        def undo() -> None:
            self._generator.set_state(generator)
            self.drawn = drawn

        return undo

    @property
    def _parameters(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    def _flat(self) -> tuple[Tensor, Tensor]:
        """x and grad V(x), both (P,)."""
        if any(p.grad is None for p in self._parameters):
            raise InvalidInput(
                "SubspaceLangevin.step: a parameter has no gradient; call backward() on V, which"
                " must depend on all of them"
            )
        x = torch.cat([p.reshape(-1) for p in self._parameters])
        gradients = [p.grad.to_dense() for p in self._parameters if p.grad is not None]
        return x, torch.cat([gradient.reshape(-1) for gradient in gradients])

    def _draw(self, x: Tensor) -> Block:
        blocks, bounds = self._blocks, self._bounds
        if callable(blocks):
            blocks = blocks(x)
            bounds = _upper_bounds(blocks)
        place = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        # Rounding can leave the last bound below 1.
        self.drawn = min(bisect_right(bounds, place), len(blocks) - 1)
        return blocks[self.drawn]


def coordinate_blocks(
    num_parameters: int, size: int = 1, *, diagonal: Tensor | None = None
) -> list[Block]:
    """Runs of `size` coordinates, equally probable a coordinate: A = I, or a diagonal.

    Args:
        num_parameters: P.
        size: coordinates a block, 1 to P; the last one may be smaller.
        diagonal: of A, (P,), positive; None for ones.

    Raises:
        InvalidInput: an impossible size, a diagonal of another length or not positive.
    """
    _refuse_size(size, num_parameters)
    if diagonal is not None and diagonal.shape != (num_parameters,):
        raise invalid("diagonal", tuple(diagonal.shape), f"({num_parameters},)")
    _refuse_indefinite("diagonal", diagonal)

    def block(begin: int, end: int) -> Block:
        def apply(vector: Tensor, power: float) -> Tensor:
            part = torch.zeros_like(vector)
            weights = 1.0 if diagonal is None else diagonal[begin:end] ** power
            part[begin:end] = vector[begin:end] * weights
            return part

        return Block(end - begin, (end - begin) / num_parameters, apply)

    return [block(i, min(i + size, num_parameters)) for i in range(0, num_parameters, size)]


def eigenvector_blocks(preconditioner: Tensor, size: int = 1) -> list[Block]:
    """Runs of `size` eigenvectors of a matrix A (P, P), largest eigenvalue first.

    Equally probable an eigenvector. For a Gaussian or a posterior, A near the covariance.

    Raises:
        InvalidInput: an impossible size, a matrix that is not square or not positive definite.
    """
    if preconditioner.dim() != 2 or preconditioner.shape[0] != preconditioner.shape[1]:
        raise invalid("preconditioner", tuple(preconditioner.shape), "a square shape (P, P)")
    _refuse_size(size, len(preconditioner))
    values, vectors = torch.linalg.eigh((preconditioner + preconditioner.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    _refuse_indefinite("preconditioner", values)
    return [
        Block(part.shape[1], part.shape[1] / len(values), _in_span(part, own))
        for part, own in zip(vectors.split(size, dim=1), values.split(size), strict=True)
    ]


def dominant_and_bulk_blocks(
    subspace: Subspace, bulk_curvature: float | None = None, *, dominant_probability: float = 0.5
) -> list[Block]:
    """Two blocks: S_k, with A = 1 / lambda_i along u_i, and the bulk, with one value for all of it.

    For an A that varies along the chain give the optimizer a function of x, such as
    `lambda x: dominant_and_bulk_blocks(tracker.update(x))`.

    Args:
        subspace: of the Hessian of V at x, eigenvalues positive.
        bulk_curvature: c in A = 1 / c on the bulk, > 0, such as lambda_{k+1}; None for lambda_k,
            above which nothing in the bulk is.
        dominant_probability: of drawing S_k, between 0 and 1.

    Raises:
        InvalidInput: an eigenvalue, curvature or probability out of range.
    """
    _refuse_indefinite("eigenvalues of the subspace", subspace.eigenvalues)
    curvature = float(subspace.eigenvalues[-1]) if bulk_curvature is None else bulk_curvature
    if not curvature > 0:
        raise invalid("bulk_curvature", curvature, "a number > 0")
    if not 0 < dominant_probability < 1:
        raise invalid("dominant_probability", dominant_probability, "a number between 0 and 1")

    def in_bulk(vector: Tensor, power: float) -> Tensor:
        return subspace.reject(vector) * curvature**-power

    size = subspace.basis.shape[0]
    in_dominant = _in_span(subspace.basis, 1 / subspace.eigenvalues)
    return [
        Block(subspace.k, dominant_probability, in_dominant),
        Block(size - subspace.k, 1 - dominant_probability, in_bulk),
    ]


def _in_span(vectors: Tensor, values: Tensor) -> Callable[[Tensor, float], Tensor]:
    def apply(vector: Tensor, power: float) -> Tensor:
        return (vectors @ (values**power * (vectors.T @ vector.to(vectors)))).to(vector)

    return apply


def _upper_bounds(blocks: Blocks) -> list[float]:
    """Where in [0, 1] the interval of each block ends."""
    probabilities = [block.probability for block in blocks]
    if not (probabilities and min(probabilities) > 0 and abs(math.fsum(probabilities) - 1) < 1e-6):
        raise invalid("blocks", f"probabilities {probabilities}", "positive ones of sum 1")
    return list(accumulate(probabilities))


def _refuse_size(size: int, num_parameters: int) -> None:
    if not 1 <= size <= num_parameters:
        raise invalid("size", size, f"an integer from 1 to P = {num_parameters}")


def _refuse_indefinite(what: str, values: Tensor | None) -> None:
    if values is not None and not bool((values > 0).all()):
        raise invalid(what, f"a value of {float(values.min()):.3g}", "positive ones")
