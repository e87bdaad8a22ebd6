"""Train twice, with and without Thalweg: what does watching cost, and is it right?

The scripts beside this one call `compare`. Nothing of it belongs into a training of your own.
"""

import ast
import copy
import inspect
import textwrap
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import thalweg
from thalweg.measure import Watcher


def compare(model: nn.Module, train: Callable[[nn.Module, bool], Watcher | None]) -> None:
    """Print what a training costs more when it is watched, and what was reported last.

    The sharpness is compared with a converged solve over the same sample, at the parameters that
    the last report saw: those of the second run before that step.

    Args:
        model: is copied for each run.
        train: trains a model, watched or not, and gives the watcher. What it does more where it is
            watched is one block, `if watched:`.
    """
    watched, alone = copy.deepcopy(model), copy.deepcopy(model)
    begin = time.process_time()
    watcher = train(watched, True)
    seconds_with = time.process_time() - begin
    assert watcher is not None
    watcher.close()
    last = watcher.history[-1]
    if last["failure"] is not None:
        raise SystemExit(f"the last report failed: {last['failure']}")

    begin, states = time.process_time(), []
    keep = _KeepState(alone, last["step"], states)
    hook = register_optimizer_step_pre_hook(keep)  # of every optimizer
    train(alone, False)
    hook.remove()
    seconds_without = time.process_time() - begin
    pairs = zip(watched.state_dict().values(), alone.state_dict().values(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)

    watched.load_state_dict(states[0])
    solve = thalweg.eigenpairs(watcher.objective, 1, tolerance=1e-5)
    truth, found = float(solve.eigenvalues[0]), last["sharpness"]
    parameters = sum(p.numel() for p in watcher.objective.parameters())
    print(f"trained      {parameters} parameters, {keep.step} steps, loss"
          f" {watcher.history[0]['loss']:.3f} -> {last['loss']:.3f}")  # fmt: skip
    print(f"lines added  {_lines_added(train)}, and the import")
    print(f"reports      {len(watcher.history)}, the last at step {last['step']}")
    print(f"overhead     {last['overhead']:.1%} counted,"
          f" {seconds_with / seconds_without - 1:.1%} measured: CPU time {seconds_with:.1f} s"
          f" with, {seconds_without:.1f} s without")  # fmt: skip
    print(f"bit for bit  {'yes' if same else 'no'}")
    print(f"sharpness    {found:.6g} reported, {truth:.6g} solved"
          f" (converged: {solve.converged}), {abs(found / truth - 1):.2%} off")  # fmt: skip


def _lines_added(train: Callable[[nn.Module, bool], Watcher | None]) -> int:
    """How many lines stand below `if watched:`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(train)))
    (block,) = (
        n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "watched"
    )
    return block.body[-1].end_lineno - block.body[0].lineno + 1


class _KeepState:
    """Counts the steps of the optimizer, and keeps the state before one of them."""

    def __init__(self, model: nn.Module, wanted: int, states: list) -> None:
        self.model, self.wanted, self.states, self.step = model, wanted, states, 0

    def __call__(self, *_: object) -> None:
        if self.step == self.wanted:
            self.states.append(copy.deepcopy(self.model.state_dict()))
        self.step += 1
