"""Optimizers that wrap others as other libraries do it: their shape, not their work."""

from __future__ import annotations

import copy
from typing import Any

from torch.optim import Optimizer


class Prepared(Optimizer):
    """As Accelerate's: a subclass that skips `Optimizer.__init__` and asks the one inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: Any) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)


class Delegating:
    """As Lightning's: takes the class of what it wraps, and asks it for everything else."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__ = type("Lightning" + kind.__name__, (self.__class__, kind), {})  # type: ignore[assignment]

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure=closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Hidden(Optimizer):
    """As torch's own PostLocalSGDOptimizer: under a name of its own, `__init__` skipped."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optim = optimizer
        self.param_groups = optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optim.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optim.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optim.step(closure)


class PublicSAM(Optimizer):
    """As the common public code of SAM: builds its base optimizer, rho is in the groups."""

    def __init__(self, params: Any, base_optimizer: type[Optimizer], rho: float, **settings: Any):
        super().__init__(params, {"rho": rho, "adaptive": False, **settings})
        self.base_optimizer = base_optimizer(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(copy.copy(self.base_optimizer.defaults))

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.base_optimizer.step(closure)
