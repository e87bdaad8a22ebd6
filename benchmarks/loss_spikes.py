"""Does the stability margin foretell the loss spikes of Adam, and does halving the rate save a run?

    python benchmarks/loss_spikes.py --text tinyshakespeare.txt

A GPT-2 of two layers learns characters by AdamW at a learning rate that is too large, once for each
seed, watched at every `--every`th step. A spike is a watched loss that is `--rise` higher than the
lowest so far. For each indicator and limit of an alarm it says how many spikes were preceded by one
(within `--before` steps), how many were missed, how many alarms no spike followed (within as many
steps), and how many steps before the spike the alarm came (median). Then each run is repeated with
the learning rate halved at each alarm of the stability margin, at each of the directional margin,
and, as a control, with half the rate from the start: is the spike gone, and where does it end?
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thalweg.integrations.huggingface_model import NextToken, next_token_loss
from thalweg.measure.alarm import Alarm
from thalweg.measure.watch import watch

Row = Mapping[str, Any]


def trained(
    options: argparse.Namespace, seed: int, alarm: Alarm | None = None, *, factor: float = 1.0
) -> list[Row]:
    """The rows of one run at a multiple of its learning rate; an alarm halves it."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(seed)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=options.width,
        n_head=4,
        vocab_size=128,
        n_positions=options.context,
        bos_token_id=0,
        eos_token_id=0,
        **off,
    )
    net = NextToken(transformers.GPT2LMHeadModel(config))
    letters = np.frombuffer(options.text.read_bytes(), dtype=np.uint8).astype(np.int64)
    count = len(letters) // options.context
    corpus = torch.from_numpy(letters[: count * options.context]).view(count, -1)
    watched = corpus[:: count // options.samples][: options.samples].contiguous()
    optimizer = torch.optim.AdamW(net.parameters(), factor * options.lr, betas=(0.9, options.beta2))
    sinks = []
    if alarm is not None:

        def halve(row: Row) -> None:
            optimizer.param_groups[0]["lr"] /= 2

        alarm.then = halve
        sinks.append(alarm)
    generator = torch.Generator().manual_seed(seed)
    probes = ["directional_stability", "critical_sharpness"]
    with watch(
        net,
        next_token_loss,
        (watched, watched),
        optimizer,
        every=options.every,
        k=1,
        quiet=True,
        probes=probes,
        sinks=sinks,
    ) as watcher:
        for _ in range(options.steps):
            rows = torch.randint(len(corpus), (options.batch_size,), generator=generator)
            batch = watched if options.full_batch else corpus[rows]
            optimizer.zero_grad()
            next_token_loss(net(batch), batch).backward()
            optimizer.step()
    return watcher.history


def spikes_of(rows: Sequence[Row], rise: float) -> list[int]:
    """The steps at which the watched loss first stands so far above its lowest value so far."""
    found, lowest, up = [], math.inf, False
    for row in rows:
        loss = row["loss"]
        if loss is None:
            continue
        if loss > lowest + rise:
            if not up:
                found.append(row["step"])
            up = True
        elif loss < lowest + rise / 2:
            up = False
        lowest = min(lowest, loss)
    return found


def alarms_of(rows: Sequence[Row], column: str, below: float, reports: int) -> list[int]:
    alarm = Alarm(column, below=below, reports=reports)
    for row in rows:
        alarm.log(row, row["step"])
    return alarm.steps


def judged(runs: Sequence[Sequence[Row]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """How well each alarm foretells the spikes of all runs."""
    table = []
    for column in ("stability_margin", "directional_margin", "critical_margin"):
        for below, reports in ((0.0, 1), (0.0, 3), (-0.3, 1), (-0.3, 3), (-1.0, 1)):
            early, missed, false, total, alarms = [], 0, 0, 0, 0
            for rows in runs:
                spikes = spikes_of(rows, options.rise)
                told = alarms_of(rows, column, below, reports)
                total, alarms = total + len(spikes), alarms + len(told)
                for spike in spikes:
                    before = [s for s in told if spike - options.before <= s < spike]
                    early += [spike - before[0]] if before else []
                    missed += not before
                false += sum(
                    not any(alarm < s <= alarm + options.before for s in spikes) for alarm in told
                )
            ahead = statistics.median(early) if early else math.nan
            table.append(
                {
                    "alarm": f"{column} < {below:g}, {reports} in a row",
                    "spikes": total,
                    "foretold": total - missed,
                    "missed": missed,
                    "alarms": alarms,
                    "false": false,
                    "steps_before": ahead,
                }
            )
    return table


def with_critical_margin(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """1 - lr lambda_c / 2 beside the others: below 0 the step itself raises the watched loss."""
    completed = []
    for row in rows:
        critical = row.get("critical_sharpness")
        known = critical is not None and math.isfinite(critical)
        margin = 1 - row["learning_rate"] * critical / 2 if known else None
        completed.append({**row, "critical_margin": margin})
    return completed


def repeated(
    options: argparse.Namespace, seed: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The same run again, its rate halved at each alarm of a margin, and at half the rate."""
    ways: dict[str, Alarm | None] = {
        column: Alarm(column, below=options.limit, reports=reports)
        for column, reports in (("stability_margin", options.reports), ("directional_margin", 1))
    }
    facts = []
    for way, alarm in (ways | {"half the rate": None}).items():
        rows = trained(options, seed, alarm, factor=1.0 if alarm else 0.5)
        halved = [] if alarm is None else alarm.steps
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        fact = {"seed": seed, "way": way, "halved": halved, "loss": losses[-1]}
        fact |= {"lowest": min(losses), "spikes": spikes_of(rows, options.rise)}
        facts.append(fact | {"learning_rate": rows[-1]["learning_rate"]})
        say("  ".join(f"{key} {value}" for key, value in facts[-1].items()))
    return facts


def main() -> None:
    options = options_of_command_line()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    say: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
    runs = []
    for seed in options.seeds:
        runs.append(with_critical_margin(trained(options, seed)))
        losses = [row["loss"] for row in runs[-1] if row["loss"] is not None]
        spikes = spikes_of(runs[-1], options.rise)
        say(f"seed {seed}: spikes at {spikes}, loss {losses[0]:.2f} to {losses[-1]:.2f}")
    table = judged(runs, options)
    for row in table:
        say("  ".join(f"{key} {value}" for key, value in row.items()))
    saved = [fact for seed in options.seeds for fact in repeated(options, seed, say)]
    if options.json:
        kept = ("step", "loss", "stability_margin", "directional_margin", "critical_margin")
        short = [[{k: row.get(k) for k in kept} for row in rows] for rows in runs]
        facts = {"table": table, "saved": saved, "runs": short}
        options.json.write_text(json.dumps(facts, indent=1))


def options_of_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="any text file")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--full-batch", action="store_true", help="train on what is watched")
    parser.add_argument("--rise", type=float, default=0.3, help="in nats")
    parser.add_argument("--before", type=int, default=60, help="steps that an alarm may be ahead")
    parser.add_argument("--limit", type=float, default=0.0, help="of the margin, for halving")
    parser.add_argument("--reports", type=int, default=3, help="in a row, for halving")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    if not options.text.is_file():
        parser.error(f"--text: no file {options.text}")
    return options


if __name__ == "__main__":
    sys.exit(main())
