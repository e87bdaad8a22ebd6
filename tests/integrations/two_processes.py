"""A training by a real trainer on two CPU processes: started by the tests, once for each process.

torchrun --nproc-per-node 2 two_processes.py huggingface|lightning WATCHED FILE
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")
torch.set_num_threads(1)


def huggingface(watched: bool, folder: Path) -> tuple[Any, Any]:
    from tests.integrations.test_huggingface import trained

    given = {"samples": 9} if watched else None
    _, callback, trainer = trained(folder, given)
    return trainer.model, callback


def lightning(watched: bool, folder: Path) -> tuple[Any, Any]:
    from tests.integrations.test_lightning import CurvatureCallback, trained

    callback = CurvatureCallback(samples=9, every=2, k=2) if watched else None
    options = {"strategy": "ddp", "devices": 2, "default_root_dir": folder}
    return trained(callback=callback, **options), callback


def main() -> None:
    kind, watched, file = sys.argv[1], sys.argv[2] == "watched", Path(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:
        model, callback = {"huggingface": huggingface, "lightning": lightning}[kind](
            watched, Path(folder)
        )
    parameters = [p.detach().reshape(-1) for p in model.parameters()]
    rows = [] if callback is None else callback.watcher.history
    found = {"theta": torch.cat(parameters).tolist(), "rows": rows}
    file.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
