"""The references that a tracker keeps: one or two, each at its own point; the nearer one serves.

Along SGD one reference is enough: the newest is the nearest. At the edge of stability the iterate
jumps between two sides of the valley, and the eigenspace turns by a quarter at every step, there
and back. One reference on each side is close at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thalweg.linalg import norm
from thalweg.tracking.reference import Reference
from thalweg.tracking.refresh_policy import RefreshPolicy

EARLY = 4
"""A reference that has to be renewed before it has served so often is kept: the next step may lead
back to it."""
IDLE = 20
"""A reference that has not served for so many updates is given up."""


@dataclass
class Anchor:
    """A reference, its theta (P,), the plan of its renewal, and the updates it has been idle."""

    reference: Reference
    theta: Tensor
    policy: RefreshPolicy
    idle: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        return {
            "reference": self.reference.state_dict(),
            "theta": self.theta,
            "policy": self.policy.state_dict(),
            "idle": self.idle,
        }


class Anchors:
    """At most two anchors; one of them serves.

    Args:
        num_samples: N.
        target: the error a step should stay below.
    """

    def __init__(self, num_samples: int, target: float) -> None:
        self._first_policy = RefreshPolicy(num_samples, target)
        self._all: list[Anchor] = []
        self._serving = 0

    @property
    def policy(self) -> RefreshPolicy:
        """That of the anchor that serves; before the first one, what it will begin with."""
        return self._all[self._serving].policy if self._all else self._first_policy

    @property
    def reference(self) -> Reference | None:
        """That of the anchor that serves; None where there is none."""
        return self._all[self._serving].reference if self._all else None

    def serve(self, theta: Tensor) -> Reference | None:
        """Let the anchor nearest to theta (P,) serve; None where there is none."""
        if not self._all:
            return None
        if len(self._all) > 1:
            distances = [float(norm(anchor.theta - theta)) for anchor in self._all]
            self._serving = distances.index(min(distances))
        for anchor in self._all:
            anchor.idle += 1
        self._all[self._serving].idle = 0
        return self.reference

    def plan(self) -> RefreshPolicy:
        """What the next reference begins with: learned from the one that serves."""
        policy = copy.deepcopy(self.policy)
        policy.plan()
        return policy

    def renew(self, reference: Reference, theta: Tensor, policy: RefreshPolicy) -> None:
        """Put a new reference in the place of the one that serves, or beside it."""
        anchor = Anchor(reference, theta, policy)
        keeps = [a for i, a in enumerate(self._all) if i != self._serving and a.idle < IDLE]
        if not keeps and self._all and self.policy.age < EARLY:
            keeps = [self._all[self._serving]]
        self._all = [*keeps, anchor]
        self._serving = len(self._all) - 1

    def forget(self) -> None:
        """Give up all references: their bases belong to another subspace."""
        if self._all:
            self._first_policy = self.plan()
        self._all, self._serving = [], 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decisions depend on."""
        return {
            "all": [anchor.state_dict() for anchor in self._all],
            "serving": self._serving,
            "first_policy": self._first_policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._first_policy.load_state_dict(state["first_policy"])
        self._serving = state["serving"]
        self._all = []
        for saved in state["all"]:
            policy = copy.deepcopy(self._first_policy)
            policy.load_state_dict(saved["policy"])
            reference = Reference(**saved["reference"])
            self._all.append(Anchor(reference, saved["theta"], policy, saved["idle"]))
