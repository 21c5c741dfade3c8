"""The plan of a run before it is submitted: what it will be, and whether it fits its ranks. Imports torch, so only when asked."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from encoder.base.errors import UserError


def plan_first(
    run_file: str, overrides: Sequence[str], *, ranks: Sequence[int], shards_must_be_there: bool
) -> None:
    """Prints the plan. Raises UserError for what cannot work on any of the numbers of ranks."""
    try:
        from encoder.base.units import short_bytes
        from encoder.runs.config import read_run
        from encoder.runs.facts import check_data
        from encoder.runs.same import check_same_data, check_same_run
        from encoder.tools.plan.fit import fit_ranks
        from encoder.tools.plan.memory import count_needs
        from encoder.tools.plan.plan import plan_text
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not on this machine, so the run cannot be planned. Use the Python"
            " that the jobs use, or --no-plan: the check job looks at everything, too."
        ) from error
    run = read_run(run_file, overrides)
    check_same_run(run, Path(run.out))
    # fewest and most nodes of a range: the run must fit both
    for count in ranks:
        # GPUs pad; a login node, which has none, does not tell what the jobs train on
        for warning in fit_ranks(run, ranks=count, padded=run.device != "cpu").warnings:
            print(f"warning: {warning}")
    if shards_must_be_there and not any(source.cache for source in run.all_sources()):
        check_same_data(run, check_data(run), Path(run.out))

    # the run folder is not there yet: the nearest folder above it is on the same disk
    place = next(
        path
        for path in (Path(run.out).absolute(), *Path(run.out).absolute().parents)
        if path.exists()
    )
    free, need = (
        shutil.disk_usage(place).free,
        2 * count_needs(run, ranks=ranks[0]).checkpoint_bytes,
    )
    if free < need:
        raise UserError(
            f"the disk of {run.out} has {short_bytes(free)} free; needed: {short_bytes(need)}, two"
            " checkpoints. Make room, or set another out."
        )
    print(plan_text(run, ranks=ranks[-1]) + "\n")
