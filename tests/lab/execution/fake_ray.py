"""What the executor needs of Ray, with tasks in threads of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


class RayError(Exception):
    """As Ray's."""


class RayTaskError(RayError):
    """As Ray's."""


class FakeTask:
    """A call in a thread.

    Attributes:
        cancelled: with force or without, as often as asked.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.cancelled: list[bool] = []
        self.result: Any = None
        self.error: RayError | None = None
        self._thread = threading.Thread(target=self._call, args=(function, arguments))
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            self.result = function(*arguments)
        except RayError as error:
            self.error = error


class FakeRay(ModuleType):
    """A module `ray`; set `sys.modules["ray"]` and `sys.modules["ray.exceptions"]`.

    Attributes:
        exceptions: the module of that name.
        asked: the options of each task.
        tasks: all that were begun.
        node_names: the nodes that there are.
        resources: of each node.
        given: what `init` was called with; None before.
    """

    def __init__(self) -> None:
        super().__init__("ray")
        self.__spec__ = ModuleSpec("ray", None)
        self.exceptions = ModuleType("ray.exceptions")
        vars(self.exceptions).update(RayError=RayError, RayTaskError=RayTaskError)
        self.asked: list[Mapping[str, Any]] = []
        self.tasks: list[FakeTask] = []
        self.node_names = ["one", "two"]
        self.resources: Mapping[str, float] = {"CPU": 1.0}
        self.given: Mapping[str, Any] | None = None

    def init(self, **options: Any) -> None:
        self.given = options

    def is_initialized(self) -> bool:
        return self.given is not None

    def shutdown(self) -> None:
        self.given = None

    def nodes(self) -> list[dict[str, Any]]:
        found = {"Alive": True, "Resources": self.resources}
        return [{"NodeID": name, **found} for name in self.node_names]

    def remote(self, function: Callable[..., Any]) -> Any:
        def begin(*arguments: Any) -> FakeTask:
            self.tasks.append(FakeTask(function, arguments))
            return self.tasks[-1]

        def options(**given: Any) -> Any:
            self.asked.append(given)
            return SimpleNamespace(remote=begin)

        return SimpleNamespace(options=options)

    def wait(self, tasks: Sequence[FakeTask], timeout: float) -> tuple[list[FakeTask], list[Any]]:
        until = time.monotonic() + timeout
        while time.monotonic() < until and not any(task.is_done for task in tasks):
            time.sleep(0.01)
        return [task for task in tasks if task.is_done][:1], []

    def get(self, task: FakeTask) -> Any:
        if task.error is not None:
            raise task.error
        return task.result

    def cancel(self, task: FakeTask, force: bool) -> None:
        task.cancelled.append(force)
