"""One rank of one version of pipeflow, which takes a step when told to: a child of `benchmarks.versions`.

It is run as a file, with the root of some version as PYTHONPATH: pipeflow and the models to train
are that version's. A line in is a step to take; a line out is its seconds, the first line its loss.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

import pipeflow as pf
from benchmarks.contenders import MODELS, make_batch, make_plan, sgd


def make_engine(case: dict[str, Any], rank: int, store: str) -> tuple[pf.Engine, dict[str, torch.Tensor]]:
    """This rank's engine, or with `threads` that of all, and the batch."""
    torch.set_num_threads(1)
    graph = MODELS[case["model"]](case["num_blocks"], case["width"])
    ranks = [0] * case["num_stages"] if case["alone"] else list(range(case["num_stages"]))
    plan = make_plan(graph, ranks, case["num_microbatches"], case["schedule"])
    transport: Literal["threads", "distributed"] = "threads"
    if case["transport"] == "processes":
        transport = "distributed"
        dist.init_process_group("gloo", store=FileStore(store, len(ranks)), rank=rank, world_size=len(ranks))
    engine = pf.Engine(graph, plan, sgd, transport=transport, num_threads=1)
    return engine, make_batch(case["width"], case["samples"] * case["num_microbatches"])


def main() -> None:
    root, rank, store, case = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    if root.resolve() not in Path(pf.__file__).resolve().parents:
        raise SystemExit(f"pipeflow is imported from {pf.__file__}, not from {root}")
    engine, batch = make_engine(case, rank, store)
    sys.stdout.write(f"{engine.step(batch).loss!r}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        start = time.perf_counter()
        engine.step(batch)
        sys.stdout.write(f"{time.perf_counter() - start!r}\n")
        sys.stdout.flush()
    engine.close()


if __name__ == "__main__":
    main()
