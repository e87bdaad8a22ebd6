"""The command that looks at a saved model: `thalweg inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.cli.output import err, out, out_json
from thalweg.errors import InvalidInput, invalid

if TYPE_CHECKING:
    from thalweg.loss.objective import Objective

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 46rem; padding: 0 1rem;
  color-scheme: light dark; }}
table {{ border-collapse: collapse; margin: 1.5rem 0; display: block; overflow-x: auto; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .4rem; }}
th, td {{ text-align: right; padding: .15rem .9rem .15rem 0; font-variant-numeric: tabular-nums; }}
th:first-child, td:first-child {{ text-align: left; }}
</style></head><body><h1>{title}</h1>{tables}</body></html>
"""


def inspect(options: argparse.Namespace) -> int:
    """Tell the curvature of a saved model: spectrum, gap, trace, sharpness by layer."""
    from thalweg.cli.studying import load_plugins
    from thalweg.contrib.curvature_summary import as_data, curvature_summary

    load_plugins(options)
    path = Path(options.model).expanduser()
    page = None if options.page is None else Path(options.page).expanduser()
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise invalid("--page", str(page), "a file in a folder that exists")
    objective = _of_folder(path, options) if path.is_dir() else _of_weights(path, options)
    found = curvature_summary(objective, options.k)
    if options.json:
        out_json(as_data(found))
    else:
        out(str(found))
    if page is not None:
        import html

        title = html.escape(f"Curvature of {path.name}")
        page.write_text(PAGE.format(title=title, tables=found._repr_html_()), encoding="utf-8")
        err(f"thalweg: {page}")
    return 0


def _of_folder(folder: Path, options: argparse.Namespace) -> Objective:
    """The loss of a model that transformers saved, over a text."""
    from thalweg.integrations.huggingface_model import saved_language_model

    if options.data is None:
        raise InvalidInput("--data: a folder of transformers needs a text: --data FILE")
    text = Path(options.data).expanduser()
    if not text.is_file():
        raise invalid("--data", str(text), "a text file")
    return saved_language_model(folder, text, samples=options.samples, context=options.context)


def _of_weights(path: Path, options: argparse.Namespace) -> Objective:
    """The loss of a problem's model with weights from a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from thalweg.lab.config import load_spec
    from thalweg.limits import check_limit
    from thalweg.loss.objective import Objective
    from thalweg.problems import build_problem

    if not path.is_file():
        allowed = "a folder of transformers, or a .safetensors file with --problem"
        raise invalid("model", str(path), allowed)
    if options.problem is None:
        raise InvalidInput("--problem: a file of weights needs the problem that they belong to")
    words = [] if options.data is None else ["--problem.data.data_dir", options.data]
    problem = build_problem(load_spec(options.problem, words).problem, seed=0)
    check_limit("parameters_bytes", path.stat().st_size, path)
    try:
        weights = load_file(path)
    except SafetensorError as error:
        hint = "write one by safetensors.torch.save_file(model.state_dict(), file)"
        raise invalid("model", str(path), "a file of safetensors", hint) from error
    try:
        problem.model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidInput(f"model: {path} does not fit {options.problem}: {reason}") from error
    return Objective(problem.model, problem.loss, problem.train)
