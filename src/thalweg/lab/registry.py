"""Which data sets, models, losses, optimizers and schedules can a spec name?

Each is one class: its fields are the settings a spec may give, its method builds the thing from
them. The class is registered under the name that specs use. A user's own classes are registered
the same way, in a module loaded with `--plugin`.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, LiteralString, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from thalweg.errors import InvalidInput, ThalwegError, invalid, unknown_name

NAME_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
"""Letters, digits, '-', '_' and '.', not starting with '.': such a name stays in its folder."""


class SpecModel(BaseModel):
    """Base of everything in a spec: frozen, no unknown keys, no silent change of type.

    `true` is not an integer here and `"5"` not a number. A field whose type cannot be written in
    TOML (a path, an enum) needs `Field(strict=False)`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _arrays_as_tuples(cls, data: Any) -> Any:
        """TOML has arrays where the fields hold tuples."""
        if not isinstance(data, Mapping):
            return data
        return {key: _tuples(value) for key, value in data.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def bad_value(
    field: str, given: object, allowed: str, mend: str = "", *, within: tuple[str | int, ...] = ()
) -> ValidationError:
    """The error for a value that its type allows and another field rules out.

    For `model_validator(mode="after")`: the message then names the key like any other.

    Args:
        field: name of the field at fault; `within`: where that is, below the validated model.

    Example:
        `raise bad_value("nesterov", True, "false without momentum", "set momentum")`
    """
    error = PydanticCustomError(
        "bad_value", "allowed: {allowed}", {"allowed": allowed, "mend": mend, "given": given}
    )
    detail = InitErrorDetails(type=error, loc=(*within, field), input=given)
    return ValidationError.from_exception_data("spec", [detail])


class Settings(SpecModel):
    """The settings of one registered thing, and how it is built from them.

    Example:
        >>> @models.register("linear")  # doctest: +SKIP
        ... class Linear(Settings):
        ...     bias: bool = True
        ...     def build(self, inputs: int, outputs: int) -> torch.nn.Module:
        ...         import torch
        ...         return torch.nn.Linear(inputs, outputs, bias=self.bias)
    """

    registered_name: ClassVar[str] = ""

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Build the thing; every registered class defines its own."""
        raise NotImplementedError(f"{type(self).__name__} has no method build")


T = TypeVar("T", bound=Settings)
S = TypeVar("S", bound=Settings)


class Registry(Generic[T]):
    """Named settings classes of one kind.

    Args:
        kind: what the entries are, in the singular ("model"), for messages.
        method: the method that every registered class must define.
    """

    def __init__(self, kind: str, method: str = "build") -> None:
        self.kind = kind
        self.method = method
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[S]], type[S]]:
        """Decorator: make the class available to specs under `name`.

        Raises:
            InvalidInput: the name is taken or malformed, or the class lacks the method.
        """

        def add(cls: type[S]) -> type[S]:
            self._check(name, cls)
            cls.registered_name = name
            self._classes[name] = cls  # type: ignore[assignment]
            return cls

        return add

    def _check(self, name: str, cls: type[Settings]) -> None:
        where = f"{self.kind} {name!r}"
        if not re.fullmatch(NAME_PATTERN, name):
            raise invalid(f"name of a {self.kind}", name, "letters, digits, '-', '_' and '.'")
        if name in self._classes:
            taken = self._classes[name]
            raise InvalidInput(
                f"{where}: already registered by {taken.__module__}.{taken.__qualname__}; "
                "choose another name"
            )
        if not (isinstance(cls, type) and issubclass(cls, Settings)):
            raise InvalidInput(
                f"{where}: {cls!r} is not a subclass of thalweg.lab.registry.Settings"
            )
        if "name" in cls.model_fields:
            raise InvalidInput(f"{where}: a field cannot be called 'name', it is the entry's own")
        if getattr(cls, self.method, None) in (None, getattr(Settings, self.method, None)):
            raise InvalidInput(f"{where}: class {cls.__name__} has no method {self.method}")

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)

    def names(self) -> tuple[str, ...]:
        """The registered names, sorted."""
        return tuple(self)

    def get(self, name: str) -> type[T]:
        """The class registered under `name`.

        Raises:
            InvalidInput: no such name; the message has the nearest one.
        """
        if name not in self._classes:
            raise unknown_name(self.kind, name, self._classes)
        return self._classes[name]

    def choice(self) -> Choice:
        """Marker for an annotated field that holds one entry of this registry.

        Example:
            `model: Annotated[Settings, models.choice()]` accepts `"mlp"`, `{"name": "mlp",
            "hidden": [100]}` or an instance; holds the instance; is written as the table.
        """
        return Choice(self)


class Choice:
    """How pydantic reads and writes a field that names one entry of a registry."""

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.read,
            serialization=core_schema.plain_serializer_function_ser_schema(
                self.write, info_arg=True
            ),
        )

    def read(self, given: Any) -> Settings:
        """The instance that a name, a table with a name, or an instance stands for."""
        if isinstance(given, Settings) and given.registered_name in self.registry:
            return given
        if isinstance(given, str):
            return self._class(given, ()).model_validate({})
        if not isinstance(given, Mapping):
            raise self._error("choice_type", given, ())
        if "name" not in given:
            raise self._error("choice_missing", dict(given), ("name",))
        settings = {key: value for key, value in given.items() if key != "name"}
        return self._class(given["name"], ("name",)).model_validate(settings)

    def write(self, value: Settings, info: core_schema.SerializationInfo) -> dict[str, Any]:
        """The table of an entry, its name first."""
        dumped = value.model_dump(mode=info.mode, exclude_none=info.exclude_none)
        return {"name": value.registered_name, **dumped}

    def _class(self, name: Any, location: tuple[str, ...]) -> type[Settings]:
        if not isinstance(name, str) or name not in self.registry:
            raise self._error("choice_unknown", name, location)
        return self.registry.get(name)

    def _error(self, kind: LiteralString, given: Any, location: tuple[str, ...]) -> ValidationError:
        """A pydantic error, so that it joins the others of the spec with its key path."""
        known = self.registry.names()
        error = PydanticCustomError(
            kind, "not a registered {kind}", {"kind": self.registry.kind, "known": known}
        )
        detail = InitErrorDetails(type=error, loc=location, input=given)
        return ValidationError.from_exception_data(self.registry.kind, [detail])


datasets: Registry[Settings] = Registry("data set")
"""Data sets: training and held-out samples with targets."""

models: Registry[Settings] = Registry("model")
"""Models: a `torch.nn.Module` for inputs and outputs of the data set's shapes."""

losses: Registry[Settings] = Registry("loss")
"""Losses: a mean over samples, from outputs and targets."""


def load_plugin(module: str) -> None:
    """Import a user's module (`my_package.problems`) or file (`problems.py`) that registers things.

    Dotted names are also looked for in the current folder. A second call with the same module
    does nothing.

    Raises:
        InvalidInput: no such module, or it fails on import; the message says where and why.
    """
    importlib.import_module("thalweg.lab.problems")  # the built-in names are taken first
    try:
        if module.endswith(".py"):
            _import_file(Path(module))
        else:
            _import_module(module)
    except ThalwegError as error:
        raise InvalidInput(f"plugin {module!r}: {error}") from error
    except Exception as error:
        raise InvalidInput(f"plugin {module!r}: {_reason(error)}") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise InvalidInput("no such file; give a .py file or the dotted name of a module")
    name = "thalweg_plugin_" + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidInput("not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise


def _import_module(name: str) -> None:
    here = str(Path.cwd())
    sys.path.append(here)  # last, so that nothing installed is shadowed
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _reason(error: Exception) -> str:
    """One line: the exception, and the last line of the user's code it went through."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__} in {error.filename}, line {error.lineno}: {error.msg}"
    place = ""
    step = error.__traceback__
    while step is not None:
        filename = step.tb_frame.f_code.co_filename
        if filename not in (__file__, importlib.__file__) and not filename.startswith("<frozen"):
            place = f" (line {step.tb_lineno} of {Path(filename).name})"
        step = step.tb_next
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{place}"
