"""Rank, world, meeting place and device from srun's variables, as SLURM sets them with and without GPU binding."""

from __future__ import annotations

import pytest

from encoder.base.dist import World, device_index, meeting_place, world_from_env
from encoder.base.errors import ConfigError


def step(**values: str) -> dict[str, str]:
    return {
        "SLURM_STEP_ID": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "gpu[07-09],big1",
        **values,
    }


def test_a_node_with_fewer_tasks_knows_its_own_number():
    world = world_from_env(
        step(
            SLURM_PROCID="6",
            SLURM_LOCALID="0",
            SLURM_NODEID="3",
            SLURM_STEP_NUM_TASKS="7",
            SLURM_STEP_TASKS_PER_NODE="2(x3),1",
        )
    )
    assert world == World(rank=6, size=7, local_rank=0, local_size=1)
    # the job's numbers are another step's
    world = world_from_env(
        step(
            SLURM_PROCID="1",
            SLURM_LOCALID="1",
            SLURM_NODEID="0",
            SLURM_NTASKS="1",
            SLURM_STEP_NUM_TASKS="4",
            SLURM_STEP_TASKS_PER_NODE="2(x2)",
            SLURM_NTASKS_PER_NODE="1",
        )
    )
    assert world == World(rank=1, size=4, local_rank=1, local_size=2)


def test_ranks_meet_at_the_first_node_and_another_start_at_another_port():
    host, port = meeting_place(step())
    assert host == "gpu07" and 15000 <= port < 32000
    others = [
        meeting_place(step(**{key: value}))
        for key, value in (
            ("SLURM_RESTART_COUNT", "1"),
            ("SLURM_STEP_ID", "2"),
            ("SLURM_JOB_ID", "4712"),
        )
    ]
    assert (
        all(place[0] == "gpu07" for place in others)
        and len({port, *(place[1] for place in others)}) == 4
    )
    assert (
        meeting_place({"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "a"}) is None
    )  # the batch script is no step


def test_a_rank_takes_its_own_gpu_with_and_without_binding():
    second = World(rank=1, size=4, local_rank=1, local_size=4)
    assert device_index(second, visible=4, env={}) == 1
    assert (
        device_index(second, visible=1, env=step(SLURM_GPUS_ON_NODE="4")) == 0
    )  # --gpus-per-task=1: numbered from 0
    assert (
        device_index(
            World(rank=3, size=4, local_rank=3, local_size=4),
            visible=2,
            env=step(SLURM_GPUS_ON_NODE="4"),
        )
        == 1
    )
    assert device_index(World(), visible=8, env={}) == 0


def test_ranks_never_share_a_gpu():
    second = World(rank=1, size=4, local_rank=1, local_size=4)
    for visible, env in (
        (2, {}),
        (1, {}),
        (2, step(SLURM_GPUS_ON_NODE="2")),
        (3, step(SLURM_GPUS_ON_NODE="4")),
    ):
        with pytest.raises(ConfigError, match="4 ranks on .* rank 1 sees"):
            device_index(second, visible=visible, env=env)
