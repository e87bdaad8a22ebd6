"""The errors that Thalweg raises on purpose, and the warnings that a name has changed.

Each error class says the exit status that it gives the command line.
"""

from __future__ import annotations

import difflib
import errno
import functools
import importlib.util
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar, cast

LONGEST_VALUE = 400
"""Characters of a given value that a message shows."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors: no room or no inodes, a quota, a limit on the size of a file."""
LARGEST_BITS = 4096
"""Python writes no integers of many more bits."""
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class ThalwegError(Exception):
    """An error whose message is meant for the user.

    Attributes:
        exit_code: the command line's status.
        of_all: all processes of a group raise it, see `loss/reduce.py`.
    """

    exit_code = 1
    of_all = False


class InvalidInput(ThalwegError, ValueError):
    """What was given cannot be used; the message names it, what is allowed, and the hint."""

    exit_code = 2


class InUse(InvalidInput):
    """Another process is at work on a folder."""


class DifferentiableOnce(InvalidInput):
    """A loss has a gradient, and no right derivative of that."""


class Diverged(ThalwegError, ArithmeticError):
    """A loss, gradient or product with the Hessian became NaN or infinite."""

    exit_code = 3


class IntegrityError(ThalwegError):
    """A file on disk is not what was written: truncated, changed, or from another run."""

    exit_code = 4


class MissingExtra(InvalidInput, ImportError):
    """A package is not installed that an optional part of Thalweg needs; the message says how."""


class Interrupted(ThalwegError):
    """Something was ended from outside: on request, or its process was; it can be resumed."""

    exit_code = 75


class ProcessLost(Interrupted):
    """Another process of the group has ended, or did not answer in time; all are to start again."""


class DiskFull(ThalwegError):
    """There is no room for a file; what was saved before is kept, and goes on once there is."""


class KinkedDifferences(UserWarning):
    """Differences of gradients were asked for where the loss has kinks: see `docs/products.md`."""


class NotNeeded(UserWarning):
    """Something was given that changes nothing here, and is left aside."""


def level_of_caller() -> int:
    """The `stacklevel` at which a warning names the line outside of Thalweg that led to it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] in ("thalweg", "contextlib")
    ):
        frame, level = frame.f_back, level + 1
    return level


def shown(value: object, longest: int = LONGEST_VALUE) -> str:
    """A value in a message: its `repr`, cut where it is long, whatever it holds.

    Example:
        >>> shown("x" * 1000, longest=10), shown(10**5000)
        ("'xxxxxx...", 'an integer of 16610 bits')
    """
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # nested too deeply, numbers too long, or a class whose own words fail
        return f"a {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def without_controls(text: str) -> str:
    """The text with what would control a terminal written out: control characters but line breaks
    and tabs, half characters, and those that change the direction of writing.

    Example:
        >>> without_controls("a\\x1b[31m")
        'a\\\\x1b[31m'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode()
        if _controls(character)
        else character
        for character in text
    )


def _controls(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or character in _REORDERING


def invalid(what: str, given: object, allowed: str, hint: str = "") -> InvalidInput:
    """Build the one-line error for a bad input.

    Example:
        >>> str(invalid("k", 0, "an integer >= 1", "use the number of classes"))
        'k: got 0, allowed: an integer >= 1; use the number of classes'
    """
    message = f"{what}: got {shown(given)}, allowed: {allowed}"
    return InvalidInput(f"{message}; {hint}" if hint else message)


def require_extra(extra: str, *modules: str) -> None:
    """Refuse to continue without the packages that an extra of the installation brings.

    Args:
        extra: its name, as in `pip install "thalweg[lab]"`.
        modules: what is imported from it.

    Raises:
        MissingExtra: one of the modules is not installed.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(
            f"{', '.join(missing)}: not installed; this part of Thalweg needs"
            f' pip install "thalweg[{extra}]"'
        )


def unknown_name(what: str, given: str, known: Iterable[str]) -> InvalidInput:
    """Build the one-line error for a name that is not registered, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(given[:LONGEST_VALUE], names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else ""
    return invalid(what, given, "one of " + ", ".join(names), hint)


def warn_of_former_name(former: str, name: str) -> None:
    """Warn that something is called otherwise now, at the line that called the caller of this."""
    hint = f"`{former}` is called `{name}` now"
    warnings.warn(hint, DeprecationWarning, stacklevel=3)


def formerly(
    **names: str,
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorator that still takes keywords by their former names, with a warning.

    Args:
        names: the present name of each former one.

    Example:
        >>> import warnings
        >>> @formerly(dear="expensive")
        ... def cost(expensive):
        ...     return expensive
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     cost(dear=3)
        3
    """

    def decorated(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def renamed(*args: object, **keywords: object) -> Result:
            for former in names.keys() & keywords.keys():
                warn_of_former_name(former, names[former])
                keywords[names[former]] = keywords.pop(former)
            return cast("Callable[..., Result]", function)(*args, **keywords)

        return cast("Callable[Parameters, Result]", renamed)

    return decorated
