"""A process that trains points one after another: torch and DeepSpeed start once, each point has an engine of its own.

    python -m encoder.finetune.sweeps.worker FD NUMBER COUNT      started by run.py, one for each --parallel

Orders come on standard input, a line of JSON each; answers go to the file descriptor FD. What a point says goes to
FOLDER/point.log. After a mistake in the input the next point is trained here; after a defect, or where memory ended, this
process ends, and a new one takes over: nothing that a fault left behind is met by another point.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from encoder.base.command import INTERRUPTED, as_user_error, complain
from encoder.base.dist import World, end_process
from encoder.base.errors import BusyRun, UserError
from encoder.base.log import forget_warnings, speak_on
from encoder.base.stopping import StopFlag
from encoder.finetune.config import read_task
from encoder.finetune.course import finetune
from encoder.finetune.prepare import LastRows

LOG = "point.log"
LOOK_SECONDS = 0.5


def main(argv: list[str]) -> int:
    """Trains what is ordered until there are no orders; returns the exit code."""
    handle, number, count = (int(word) for word in argv)
    # the world's place on this machine gives a point its GPU, or its share of the cores
    world = World(local_rank=number, local_size=count)
    speak_on(world.first)
    orders = _listen(sys.stdin)
    last = LastRows()
    began = psutil.Process().create_time()
    with os.fdopen(handle, "w", encoding="utf-8") as answers, StopFlag() as stop:
        while (order := _next(orders, stop)) is not None:
            answer = _train(order, world, stop, began=began, last=last)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            began = time.time()
            if answer["ends"]:
                return 1
    return 0


def _listen(stream: IO[str]) -> queue.Queue[dict[str, Any] | None]:
    """The orders, then None. Where the other side dies without a word, this process is asked to save and leave."""
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in stream:
            order = json.loads(line)
            orders.put(order)
            if order is None:
                return
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, name="orders", daemon=True).start()
    return orders


def _next(orders: queue.Queue[dict[str, Any] | None], stop: StopFlag) -> dict[str, Any] | None:
    while not stop.asked:
        with contextlib.suppress(queue.Empty):
            return orders.get(timeout=LOOK_SECONDS)
    return None


def _train(
    order: dict[str, Any], world: World, stop: StopFlag, *, began: float, last: LastRows
) -> dict[str, Any]:
    """Trains a point; says how it ended: done, stopped, busy, or failed with a reason.

    order: folder, base (a task file) and overrides
    world: of this process
    stop: listens
    began: seconds since 1970; what passed since then was this point's start
    last: rows that the point before has encoded
    """
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    ended, failure, ends = "failed", "", False
    with _output_to(folder / LOG):
        forget_warnings()
        try:
            task = read_task(order["base"], order["overrides"])
            outcome = finetune(task, world, stop=stop, began=began, last=last)
            ended = "done" if outcome.done else "stopped"
        except BusyRun:
            ended = "busy"
        except (UserError, OSError) as error:
            failure = str(as_user_error(error))
            complain(failure)
            traceback.clear_frames(error.__traceback__)
        except KeyboardInterrupt:
            ended, ends = "stopped", True
        except Exception as error:
            traceback.print_exc()
            failure = (
                f"{type(error).__name__}: {str(error)[:200]}. Its traceback is in {folder / LOG}"
            )
            ends = True
            traceback.clear_frames(error.__traceback__)
    _free_memory()
    return {"ended": ended, "failure": failure, "ends": ends}


def _free_memory() -> None:
    """An engine holds itself in circles: its hooks know it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Standard output and error, also of libraries, go to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(stream) for stream in (1, 2)]
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, was in zip((1, 2), before, strict=True):
            os.dup2(was, stream)
            os.close(was)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception:
        traceback.print_exc()
        code = 1
    end_process(code)
