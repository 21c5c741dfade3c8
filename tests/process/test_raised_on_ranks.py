"""A run that raised on several ranks does not stand in the way of the next one in the same processes."""

from __future__ import annotations

from pathlib import Path

from encoder.base.dist import World, leave
from encoder.base.errors import UserError
from encoder.train.config import read_run
from encoder.train.loop import pretrain
from tests.process.ranks import run_ranks
from tests.process.test_killed_run import RUN
from tests.shards_for_tests import random_documents, write_source


def trains_after_a_failure(world: World, *, folder: str) -> list[str]:
    from encoder.data.loader import Loader

    # the launcher of tests has joined: the runs are to join themselves
    leave()
    said = []
    plain = Loader.next_step

    def fails(self: Loader) -> None:
        raise UserError("a shard is damaged.")

    for number, step in enumerate((fails, plain)):
        Loader.next_step = step
        settings = [f"out={folder}/{number}", "loader.workers=0", *(f"phases.{i}.tokens=2K" for i in range(3))]
        try:
            said.append(f"done {pretrain(read_run(f'{folder}/run.yaml', settings), world).done}")
        except UserError as error:
            said.append(str(error))
    return said


def test_a_run_follows_one_that_raised_on_two_ranks_of_a_process(tmp_path: Path) -> None:
    write_source(tmp_path / "a", random_documents(60, seed=1, longest=60), vocab_size=64)
    write_source(tmp_path / "held", random_documents(30, seed=2, longest=60), vocab_size=64)
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path, tokens="2K"), encoding="utf-8")
    said = run_ranks(trains_after_a_failure, 2, folder=str(tmp_path))
    assert said[0] == ["a shard is damaged.", "done True"] and said[1][1] == "done True"
