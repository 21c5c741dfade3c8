"""Where the ranks of process tests come from: one process that has imported everything and done nothing forks them.

    python -m tests.process.nursery                    a line of standard input a rank: its environment, function, values, PATH
    PATH.pid  PATH.out  PATH.err  PATH.json  PATH.code      its process, its words, its result, how it ended (-9: killed)

multiprocessing's own fork server would be shared with the loader's workers, which it must not be. When standard input ends, so
do all ranks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import traceback
from pathlib import Path
from typing import Any

import torch

from encoder.base.dist import end_process, join, leave, world_from_env
from encoder.base.files import write_atomic
from encoder.engine.zero.config import import_deepspeed

# torch._dynamo: a model without data, at stage 3, asks it; 1.5 s of CPU in every rank
# sklearn, scipy: every rank of a fine-tuning measures by them; 2.5 s of CPU in each
NAMES = (
    "encoder.train.pretraining",
    "encoder.tools.weights.export",
    "encoder.tools.weights.grow",
    "torch._dynamo",
    "sklearn.metrics",
    "scipy.stats",
    "pytest",
)


def serve() -> None:
    """Forks and buries until standard input ends."""
    torch.set_num_threads(1)
    # some 700,000 objects come and stay: looking for garbage among them meanwhile takes a tenth of the time
    gc.disable()
    import_deepspeed(torch.device("cpu"))
    for name in NAMES:
        importlib.import_module(name)
    # DeepSpeed collects garbage at each load of stage 3: 13 times in 28 s on a busy machine, with all that was imported here
    gc.freeze()
    gc.enable()
    paths: dict[int, str] = {}
    text, ended = b"", False
    while not ended:
        if select.select([0], [], [], 0.02 if paths else None)[0]:
            read = os.read(0, 65536)
            ended, text = not read, text + read
            *lines, text = text.split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    be_rank(**order)
                paths[pid] = order["path"]
                write_atomic(Path(order["path"] + ".pid"), str(pid))
        for pid in [*paths]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                write_atomic(Path(paths.pop(pid) + ".code"), str(os.waitstatus_to_exitcode(status)))
    for pid in paths:
        os.kill(pid, signal.SIGKILL)


def be_rank(
    *, env: dict[str, str], module: str, name: str, values: dict[str, Any], path: str
) -> None:
    """Runs a function on one rank; its result, as JSON, is in PATH.json."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(path + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(env)
    code = 1
    try:
        world = world_from_env()
        join(world, device=torch.device("cpu"), timeout_seconds=60.0)
        try:
            value = getattr(importlib.import_module(module), name)(world, **values)
            Path(path + ".json").write_text(json.dumps(value))
        finally:
            leave()
        code = 0
    except BaseException:
        traceback.print_exc()
    end_process(code)


if __name__ == "__main__":
    serve()
