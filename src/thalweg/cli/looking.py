"""The commands that look at what is there: list, show, compare, check, claims, spec, env."""

from __future__ import annotations

import argparse
from pathlib import Path

from thalweg.cli.output import err, out, out_json


def list_runs(options: argparse.Namespace) -> int:
    """List the runs there are."""
    from thalweg.lab.differing_settings import in_words
    from thalweg.lab.inspection import run_rows

    rows = run_rows(options.root)
    if options.json:
        out_json(rows)
        return 0
    if not rows:
        err(f"thalweg: no study in {options.root}; start one with: thalweg reproduce")
    for row in rows:
        loss = row.get("loss")
        numbers = f"step {row.get('step', 0)}" + (f", loss {loss:.4g}" if loss is not None else "")
        settings = f"  {in_words(row['settings'])}" if "settings" in row else ""
        out(f"{row['run']}  {row['state']}  {numbers}{settings}")
    return 0


def show(options: argparse.Namespace) -> int:
    """Show a study or a run."""
    from thalweg.analysis.quantities import quantities
    from thalweg.lab.differing_settings import in_words
    from thalweg.lab.inspection import describe

    description = describe(options.run, options.root)
    if options.json:
        out_json(description)
        return 0
    width = max(len(key) for key in description)
    for key, value in description.items():
        value = in_words(value) if key == "settings" else value
        what = f"  ({quantities[key].what})" if key in quantities else ""
        out(f"{key:{width}}  {value}{what}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Compare runs at their last common measured step."""
    from thalweg.analysis.quantities import quantities
    from thalweg.lab.inspection import compare as compare_runs

    table = compare_runs(options.runs, options.root)
    if options.json:
        out(str(table.to_json(orient="index", indent=2)))
        return 0
    labels = [quantities[name].label if name in quantities else "" for name in table.index]
    words = table.map(lambda value: value if isinstance(value, str) else f"{value:.7g}")
    out(words.assign(**{"": labels}).to_string())
    return 0


def check(options: argparse.Namespace) -> int:
    """Verify all of a study; with `--repair`, go back to its newest good state."""
    from thalweg.cli.studying import load_plugins
    from thalweg.errors import IntegrityError
    from thalweg.lab import checking
    from thalweg.lab.store import StudyFolder
    from thalweg.lab.store.folders import find_study

    load_plugins(options)
    # A folder without its spec.toml is one that can be repaired, too.
    named = StudyFolder(Path(options.study))
    study = named if named.runs() else find_study(options.study, options.root)
    checked, done = checking.repair(study) if options.repair else (checking.check(study), [])
    if options.json:
        found = [{"path": str(one.path), "what": one.what} for one in checked.findings]
        out_json({"findings": found, "notes": checked.notes, "repair": done})
    else:
        for one in checked.findings:
            out(one.what)
    for line in checking.summary(study, checked, done):
        err(f"thalweg: {line}")
    return IntegrityError.exit_code if checked.findings and not done else 0


def claims(options: argparse.Namespace) -> int:
    """List the claims, their rules and the last verdicts."""
    from thalweg.analysis.claims.verdicts import claim_rows

    rows = claim_rows(options.root)
    if options.json:
        out_json(rows)
        return 0
    for row in rows:
        out(f"{row['claim']}: {row['statement']}")
        for key in ("source", "statistic", "rule", "refuted_by", "minimum_seeds"):
            out(f"    {key.replace('_', ' ')}: {row[key]}")
        for study, verdict in row["verdicts"].items():
            out(f"    last verdict in {study}: {verdict}")
    return 0


def spec(options: argparse.Namespace) -> int:
    """List the built-in specs, or show one in full."""
    from thalweg.cli.studying import load_plugins
    from thalweg.errors import unknown_name
    from thalweg.lab.config import builtin_specs, builtin_studies, dump_spec, load_spec, load_study

    load_plugins(options)
    studies = builtin_studies()
    if options.action == "list":
        out("studies, for thalweg reproduce NAME --problem PROBLEM")
        for name, description in studies.items():
            out(f"  {name:30} {description}")
        out("problems' own specs, for thalweg run NAME")
        for name, description in builtin_specs().items():
            out(f"  {name:30} {description}")
        return 0
    if options.spec is None:
        raise unknown_name("spec", "", [*builtin_specs(), *studies])
    if options.spec in studies:
        found = load_study(options.spec, None, options.overrides)
    else:
        found = load_spec(options.spec, options.overrides)
    out(dump_spec(found), end="")
    return 0


def env(options: argparse.Namespace) -> int:
    """Print versions and machine."""
    from thalweg.environment import environment

    found = environment()
    if options.json:
        out_json(found)
        return 0
    for key, value in found.items():
        out(f"{key}: {value}")
    return 0
