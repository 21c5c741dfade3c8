#!/usr/bin/env python3
"""Submit a run, or the preparation of its shards, as a chain of SLURM jobs; and see how it stands.

    slurm/submit.py RUN.yaml [key=value ...] --nodes 4 --gpus-per-node 8 --time 24:00:00
    slurm/submit.py RUN.yaml --nodes 2 --tasks-per-node 2 --prep CONFIG --parts 16 --export OUT     the whole way
    slurm/submit.py --prep CONFIG --parts 16                                                        shards alone
    slurm/submit.py status RUN.yaml                                                                 or the run folder

The chain is prep -> merge -> check -> training -> export, each job started when the one before ended well. The training
requeues itself until the run is done; where a centre forbids that, --jobs 5 submits five that go on one after the other.
All phases of a run are trained by that one job. The same command again goes on: parts of the data that are there are not
made again, and the training continues from its newest checkpoint.

Nothing is submitted that cannot work: the run file is planned first (launch/plan.py prints the same), held against the
number of ranks, and the request against what the cluster has. Exit code: 0 done, 2 a mistake in the input or refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT)]  # not this folder, whose own name must not hide a library

from encoder.tools.cluster.submit import Chain, submit  # noqa: E402


def command(argv: list[str] | None = None) -> int:
    """Parses, checks, submits; returns the exit code."""
    chain = Chain(description=__doc__, home=ROOT, missing_parts=missing_parts)
    return submit(sys.argv[1:] if argv is None else argv, chain)


def missing_parts(config: Path, overrides: list[str], parts: int) -> str | None:
    """Parts of a preparation that are not there, as --array takes them; empty: merging is left; None: all is done."""
    from data_prep import prepare
    from data_prep.config import read_preparation
    from data_prep.segments import numbers_text

    settings = read_preparation(config, overrides)
    if prepare.all_made(settings):
        return None
    return numbers_text(prepare.missing_parts(settings, count=parts))


if __name__ == "__main__":
    sys.exit(command())
