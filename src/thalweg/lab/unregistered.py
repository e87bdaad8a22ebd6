"""Which names of a study has nothing here registered, and which plugins made its runs?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from thalweg import registry
from thalweg.errors import InvalidInput
from thalweg.lab.config.layering import OFF
from thalweg.lab.sharing import plugins_in
from thalweg.lab.store import StudyFolder
from thalweg.lab.tables import parse_toml

_OF_PROBLEM = {"data": registry.datasets, "model": registry.models, "loss": registry.losses}
_OF_PHASE = {"optimizer": registry.optimizers, "schedule": registry.schedules}
_LISTS = {"claims": registry.claims, "figures": registry.figures}


def require_registered(study: StudyFolder) -> None:
    """Check that what a study names is there: a plugin that registers it may not have been given.

    Raises:
        InvalidInput: it is not; the message says `--plugin`, and which plugins its runs were made
            with.
    """
    raw = parse_toml(study.spec_text, str(study.spec_file))
    missing = list(dict.fromkeys(_missing(raw)))
    if not missing:
        return
    plugins = plugins_in(study)
    made = f", which its runs were made with: {', '.join(plugins)}" if plugins else ""
    raise InvalidInput(
        f"{study.path}: {', '.join(missing)}: not registered; give the plugin that registers it"
        f" with --plugin FILE{made}"
    )


def _missing(raw: Mapping[str, Any]) -> Iterator[str]:
    """What is not registered, each as its kind and name."""
    for kind, given in _named(raw):
        name = given.get("name") if isinstance(given, Mapping) else given
        if isinstance(name, str) and name not in kind and name != OFF:
            yield f"{kind.kind} {name!r}"


def _named(raw: Mapping[str, Any]) -> Iterator[tuple[registry.Registry[Any], Any]]:
    """Everything in the tables that names a registered thing, with the registry."""
    branches = list(_table(raw, "branches").values())
    phases = [*_list(raw, "phases"), *branches]
    for key, kind in _OF_PROBLEM.items():
        yield kind, _table(raw, "problem").get(key)
    for phase in filter(lambda one: isinstance(one, Mapping), phases):
        for key, kind in _OF_PHASE.items():
            yield kind, phase.get(key)
    for measuring in filter(lambda one: isinstance(one, Mapping), (raw, *branches)):
        for name in _table(measuring, "probes"):
            yield registry.probes, name
    for key, kind in _LISTS.items():
        for one in _list(raw, key):
            yield kind, one


def _table(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = raw.get(key)
    return found if isinstance(found, Mapping) else {}


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    found = raw.get(key)
    return found if isinstance(found, list) else []
