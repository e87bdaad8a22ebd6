"""How does an experiment come from a file, a name and the command line, and go back to a file?

A spec is read from TOML, changed by what the command line says, and validated at once:

    load_spec("digits", ["--seeds", "0", "1", "--lr", "0.1"])

What the command line says goes before the file, the file before the built-in spec that it
`extends` (if it says so), that before the defaults.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from thalweg.errors import InvalidInput, invalid, unknown_name
from thalweg.lab.config.former_keys import FORMAT, present_path, with_former_keys, with_present_keys
from thalweg.lab.config.layering import (
    OF_A_BRANCH_ALONE,
    OFF,
    UNSET,
    difference,
    laid_over,
    taken_over,
    with_common_branch,
    with_full_branches,
)
from thalweg.lab.config.learning_rates import Constant
from thalweg.lab.config.messages import explain, nearest, shown
from thalweg.lab.config.overrides import apply_overrides, parse_overrides
from thalweg.lab.config.phases import NoiseSpec, PhaseSpec, SplitSpec
from thalweg.lab.config.smoke_run import smoke
from thalweg.lab.config.spec import BranchSpec, CheckpointSpec, ClaimSpec, Spec, SubspaceSpec
from thalweg.lab.tables import check_tables, parse_toml
from thalweg.limits import read_bytes
from thalweg.problems.problem_spec import ProblemSpec

__all__ = [
    "PROBLEM_SPECS",
    "BranchSpec",
    "CheckpointSpec",
    "ClaimSpec",
    "NoiseSpec",
    "PhaseSpec",
    "ProblemSpec",
    "Spec",
    "SplitSpec",
    "SubspaceSpec",
    "builtin_specs",
    "check_names",
    "dump_spec",
    "load_spec",
    "parse_spec",
    "spec_hash",
]

SPECS = Path(__file__).parent / "builtin"

PROBLEM_SPECS: dict[str, str] = {
    "digits": "digits",
    "digits-cross-entropy": "digits-cross-entropy",
    "mnist": "mnist-mlp",
    "mnist-standardized": "mnist-mlp-standardized",
    "mnist-closest-replication": "mnist-mlp-closest-replication",
    "mnist-cross-entropy": "mnist-mlp-cross-entropy",
    "fashion-mnist": "fashion-mnist-mlp",
    "cifar10": "cifar10-cnn",
    "cifar10-cross-entropy": "cifar10-cnn-cross-entropy",
    "cifar10-vgg11": "cifar10-vgg11",
    "cifar10-resnet8": "cifar10-resnet8",
    "sst2": "sst2-transformer",
    "sst2-cross-entropy": "sst2-transformer-cross-entropy",
    "tinyshakespeare": "tinyshakespeare",
}
"""The built-in spec of each problem, at the paper's settings where it has them."""

NOT_HASHED = {
    "name",
    "description",
    "seeds",
    "threads",
    "checkpoint",
    "claims",
    "figures",
    "branches",
}
SWEEP = "sweep"
"""Table of a spec file that says what a sweep of it tries; no part of the spec."""
MEASURED = ("chunk_size", "vectorize_up_to")
"""Keys of [problem] that are filled in by measuring: they change rounding alone."""


def load_spec(name_or_path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Spec:
    """The spec in a TOML file, or the built-in one of that name, with values overridden.

    Args:
        name_or_path: anything with a folder or the ending `.toml` is a path.
        overrides: words of the command line (`["--lr", "0.1"]`), or values by key path
            (`{"phases.0.optimizer.lr": 0.1}`).

    Raises:
        InvalidInput: one line for each mistake.
    """
    tables, source = spec_tables(name_or_path)
    if SWEEP in tables:
        raise InvalidInput(f"{source}: has a table [{SWEEP}]: thalweg sweep {name_or_path}")
    return parse_spec(tables, source=source, overrides=overrides)


def spec_tables(name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """The tables of a spec as its file has them, and what messages call the file.

    Raises:
        InvalidInput: there is no such file or name, or it is no TOML.
    """
    path, source = _find(name_or_path)
    return read_toml(path, source), source


def parse_spec(
    raw: Mapping[str, Any],
    *,
    source: str = "spec",
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Spec:
    """The spec that nested tables stand for; `source` names them in messages.

    Raises:
        InvalidInput: one line for each mistake.
    """
    _register_built_ins()
    if not isinstance(raw, Mapping):
        raise invalid(source, raw, "tables of settings")
    check_tables(raw, source)
    given = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    check_tables(given, "command line")
    given = {present_path(key): value for key, value in given.items()}
    tables = with_common_branch(with_present_keys(raw, source))
    changed, overridden = apply_overrides(tables, given, Spec)
    check_tables(changed, "command line")
    own = with_present_keys(changed, "command line")
    full = with_full_branches(own)
    try:
        spec = Spec.model_validate(full)
    except ValidationError as error:
        raise explain(error, Spec, full, source, overridden, own) from None
    if not spec.smoke:
        return spec
    asked_here = "smoke" in given and given.keys().isdisjoint(("seed", "seeds"))
    return smoke(spec.model_copy(update={"seeds": spec.seeds[:1]}) if asked_here else spec)


def dump_spec(spec: Spec) -> str:
    """The spec as TOML, every value that is set; `parse_spec` of it gives an equal spec.

    A branch is written as what it does otherwise than the phase that it starts from.
    """
    import tomli_w

    written = spec.model_dump(mode="json", exclude_none=True)
    written["branches"] = {
        name: _written_branch(branch, written) for name, branch in written["branches"].items()
    }
    return tomli_w.dumps({"format": FORMAT, **written})


def _written_branch(branch: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """What a branch does otherwise than the phase it starts from, of the tables of a full spec."""
    start = branch.get("starts_from")
    above = spec["phases"][-1] if start is None else spec["branches"][start]
    alone = {key: branch[key] for key in OF_A_BRANCH_ALONE if key in branch and key != "name"}
    if "subspace" in alone:
        alone["subspace"] = difference(spec["subspace"], alone["subspace"], UNSET)
    phase = {key: value for key, value in branch.items() if key not in OF_A_BRANCH_ALONE}
    return alone | difference(taken_over(above), phase, OFF)


def spec_hash(spec: Spec) -> str:
    """Eight hexadecimal digits of what determines a study's numbers.

    In: problem, subspace, phases and branches (with what they inherit), probes (the tracker
    works when it is asked), device, dtype, initial checkpoint, processes (sums over their samples
    are rounded otherwise), whether it is a smoke run.
    Out, as they leave a run's numbers alone: name (in the folder's name already), description,
    seeds (a folder each), claims and figures (made afterwards), checkpoint, labels of phases, the
    folder of the data files.
    Out, as they change rounding alone and may be filled in by measuring: threads, chunk size, way
    to multiply.
    Out, as more steps extend a run: the bound of a branch whose learning rate and split do not
    depend on it (constant schedule, constant factors) and that no other branch starts after.
    """
    kept = spec.model_dump(mode="json", exclude_none=True, exclude=NOT_HASHED)
    kept["problem"]["data"].pop("data_dir", None)
    if spec.processes == 1:
        del kept["processes"]  # as it was before there was a choice
    if not spec.smoke:
        del kept["smoke"]
    for key in MEASURED:
        kept["problem"].pop(key, None)
    kept["phases"] = [with_former_keys(phase) for phase in kept["phases"]]
    for phase in kept["phases"]:
        del phase["name"]
    kept["branches"] = {name: branch_content(spec, name) for name in spec.branches}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def branch_content(spec: Spec, name: str) -> dict[str, Any]:
    """What determines a branch's numbers besides where it starts."""
    phase, branch = spec.branch_phase(name), spec.branches[name]
    continued = any(other.starts_from == name for other in spec.branches.values())
    extendable = can_be_extended(phase) and not continued
    left_out = {"name", "steps", "epochs"} if extendable else {"name"}
    content = phase.model_dump(mode="json", exclude_none=True, exclude=left_out)
    if branch.starts_from is not None:
        content["starts_from"] = branch.starts_from
    if branch.subspace is not None:
        content["subspace"] = branch.subspace.model_dump(mode="json", exclude_none=True)
    if branch.probes is not None:
        content["probes"] = branch.probes
    return with_former_keys(content)


def can_be_extended(phase: PhaseSpec) -> bool:
    """Whether the steps of a phase are the same ones under a higher bound."""
    scheduled = phase.split is not None and phase.split.is_scheduled
    # Local SGD caps its last round by the steps that remain.
    return isinstance(phase.schedule, Constant) and not scheduled and phase.local is None


def builtin_specs() -> dict[str, str]:
    """The names of the built-in specs, with their descriptions."""
    found = sorted(SPECS.glob("*.toml"))
    return {path.stem: read_toml(path, path.name).get("description", "") for path in found}


def check_names(
    spec: Spec,
    *,
    probes: Iterable[str] | None = None,
    claims: Iterable[str] | None = None,
    figures: Iterable[str] | None = None,
    source: str = "spec",
) -> None:
    """Check the spec's probes, claims and figures against the known ones, where these are given.

    Raises:
        InvalidInput: one line for each unknown name, with the nearest known one.
    """
    lines: list[str] = []
    if probes is not None:
        lines += _unknown(spec.all_probes, tuple(probes), f"{source}: probes: no probe")
    if claims is not None:
        names = dict.fromkeys(use.name for use in spec.claim_uses)
        lines += _unknown(names, tuple(claims), f"{source}: claims: no claim")
    if figures is not None:
        lines += _unknown(spec.figures or (), tuple(figures), f"{source}: figures: no figure")
    if lines:
        raise InvalidInput("\n".join(lines))


def _unknown(given: Iterable[str], known: tuple[str, ...], start: str) -> list[str]:
    allowed = ", ".join(known)
    return [
        f"{start} {shown(name)}, allowed: {allowed}{nearest(name, known)}"
        for name in given
        if name not in known
    ]


def _register_built_ins() -> None:
    """The names of data sets, models and losses exist once their module is imported."""
    importlib.import_module("thalweg.problems")


def _find(name_or_path: str | Path) -> tuple[Path, str]:
    """The file, and how messages call it."""
    text = str(name_or_path)
    is_path = isinstance(name_or_path, Path) or text.endswith(".toml") or re.search(r"[/\\]", text)
    if is_path:
        return Path(name_or_path), text
    built_in = {path.stem: path for path in SPECS.glob("*.toml")}
    if text not in built_in:
        raise unknown_name("spec", text, built_in)
    return built_in[text], f"built-in spec {text}"


def read_toml(path: Path, source: str) -> dict[str, Any]:
    """The tables of a TOML file; `source` is how messages call it.

    Raises:
        InvalidInput: it cannot be read, or is no TOML: line and column are named.
    """
    try:
        text = read_bytes(path, "spec_bytes").decode("utf-8").replace("\r\n", "\n")
    except FileNotFoundError:
        raise InvalidInput(f"{source}: no such file; give a TOML file or a built-in name") from None
    except OSError as error:
        raise InvalidInput(f"{source}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{source}: not a text in UTF-8 (byte {error.start})") from None
    except ValueError as error:  # a zero byte in the path
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{source!r}: cannot be read ({error})") from None
    raw = parse_toml(text, source)
    return _over_what_it_extends(with_present_keys(raw, source), source)


def _over_what_it_extends(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """The spec laid over the built-in one that it `extends`."""
    below = raw.pop("extends", None)
    if below is None:
        return raw
    names = {path.stem: path for path in SPECS.glob("*.toml")}
    if not isinstance(below, str) or below not in names:
        allowed = f"one of {', '.join(sorted(names))}{nearest(below, names)}"
        raise InvalidInput(f"{source}: extends: got {shown(below)}, allowed: {allowed}")
    return laid_over(read_toml(names[below], f"built-in spec {below}"), raw)
