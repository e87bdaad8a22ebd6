"""Which data sets, models, losses, optimizers and schedules can a spec name?

Each is one class: its fields are the settings a spec may give, its method builds the thing from
them. The class is registered under the name that specs use. A user's own classes are registered
the same way, in a module loaded with `--plugin`.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, LiteralString, TypeVar

from thalweg.errors import InvalidInput, invalid, require_extra
from thalweg.registry import Registry

require_extra("lab", "pydantic")

from pydantic import (  # noqa: E402
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PydanticSchemaGenerationError,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import (  # noqa: E402
    CoreSchema,
    InitErrorDetails,
    PydanticCustomError,
    core_schema,
)


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
    field: str, given: object, allowed: str, hint: str = "", *, within: tuple[str | int, ...] = ()
) -> ValidationError:
    """The error for a value that its type allows and another field rules out.

    For `model_validator(mode="after")`: the message then names the key like any other.

    Args:
        field: name of the field at fault; `within`: where that is, below the validated model.

    Example:
        `raise bad_value("nesterov", True, "false without momentum", "set momentum")`
    """
    error = PydanticCustomError(
        "bad_value", "allowed: {allowed}", {"allowed": allowed, "hint": hint, "given": given}
    )
    detail = InitErrorDetails(type=error, loc=(*within, field), input=given)
    return ValidationError.from_exception_data("spec", [detail])


@dataclass(frozen=True)
class Wording:
    """Marks a type with the words that say what it allows, where its parts do not."""

    text: str


Count = Annotated[int, Field(ge=1)]


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
    builder: ClassVar[str] = "build"
    """The method that every registered class of this kind must define."""
    listed: ClassVar[bool] = True
    """Whether the name is told to whoever may choose one: not that of a Python object."""

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Build the thing; every registered class defines its own."""
        raise NotImplementedError(f"{type(self).__name__} has no method build")


S = TypeVar("S", bound=Settings)


def registered(kind: str, name: str, cls: object) -> type[Settings]:
    """The class, which now knows its registered name; one that no spec could name is refused.

    Raises:
        InvalidInput: no subclass of `Settings`, a field called 'name', or no method that builds.
    """
    where = f"{kind} {name!r}"
    if not (isinstance(cls, type) and issubclass(cls, Settings)):
        raise InvalidInput(f"{where}: {cls!r} is not a subclass of thalweg.settings.Settings")
    if "name" in cls.model_fields:
        raise InvalidInput(f"{where}: a field cannot be called 'name', it is the entry's own")
    if getattr(cls, cls.builder, None) in (None, getattr(Settings, cls.builder, None)):
        raise InvalidInput(f"{where}: class {cls.__name__} has no method {cls.builder}")
    cls.registered_name = name
    return cls


def with_signature_of(
    made_by: Callable[..., Any], base: type[S], given: Collection[str], what: str
) -> type[S]:
    """A class of settings, one for each parameter of a function or class.

    A parameter whose type no spec can write, such as a generator, keeps its default.

    Args:
        made_by: what builds the thing.
        base: the class to derive from.
        given: names of parameters that are no settings: what is given to each thing that is built.
        what: how messages call it.

    Raises:
        InvalidInput: a parameter without a default has a type that no spec can write.

    Example:
        >>> def ring(radius: float, points: int = 100): ...
        >>> with_signature_of(ring, Settings, (), "data set 'ring'")(radius=2.0)
        ring(radius=2.0, points=100)
    """
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(made_by).parameters
    except ValueError:
        raise invalid(what, made_by, "a function or class whose parameters can be read") from None
    hints = _hints(made_by)
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in given or parameter.kind in several:
            continue
        empty = parameter.default is inspect.Parameter.empty
        annotation = _writable(hints.get(name, Any if empty else type(parameter.default)))
        if annotation is None and empty:
            hint = "give it a default, or register a class of thalweg.settings.Settings"
            raise invalid(f"{what}: type of {name}", hints[name], "what a spec can write", hint)
        if annotation is not None and (empty or _fits(annotation, parameter.default)):
            fields[name] = (annotation, ... if empty else parameter.default)
    return create_model(
        made_by.__name__,
        __base__=base,
        __module__=made_by.__module__,
        __doc__=inspect.getdoc(made_by),
        **fields,
    )


def _hints(made_by: Callable[..., Any]) -> dict[str, Any]:
    """The types of the parameters; those imported for a type checker alone are left out."""
    function = made_by.__init__ if isinstance(made_by, type) else made_by
    try:
        return typing.get_type_hints(function)
    except NameError:
        hints = getattr(function, "__annotations__", {})
        return {name: hint for name, hint in hints.items() if not isinstance(hint, str)}


def _writable(annotation: Any) -> Any:
    """The part of a type that a spec can write, arrays as tuples; None where there is none."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [_writable(member) for member in typing.get_args(annotation)]
        members = [member for member in found if member not in (None, type(None))]
        if not members:
            return None
        return typing.Union[tuple(member for member in found if member is not None)]  # noqa: UP007
    if typing.get_origin(annotation) in (list, Sequence):
        return tuple[(*typing.get_args(annotation), ...)]
    try:
        TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return None
    return annotation


def _fits(annotation: Any, default: object) -> bool:
    try:
        TypeAdapter(annotation).validate_python(_tuples(default))
    except ValidationError:
        return False
    return True


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
        return self.registry[name]

    def _error(self, kind: LiteralString, given: Any, location: tuple[str, ...]) -> ValidationError:
        """A pydantic error, so that it joins the others of the spec with its key path."""
        known = self.registry.names()
        error = PydanticCustomError(
            kind, "not a registered {kind}", {"kind": self.registry.kind, "known": known}
        )
        detail = InitErrorDetails(type=error, loc=location, input=given)
        return ValidationError.from_exception_data(self.registry.kind, [detail])
