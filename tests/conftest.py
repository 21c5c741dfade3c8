"""What every test shares: one thread, which marked tests a plain run leaves out, and how many files `-n auto` runs at a time."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# marks of what a plain run leaves out
LEFT_OUT = ("gpu", "cluster", "slow", "matrix")

# some million objects are made while tests are collected, and stay: looking for garbage among them took 6 of 30 s
gc.disable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", action="store_true", help="also run tests marked slow (minutes each)"
    )
    parser.addoption(
        "--matrix",
        action="store_true",
        help="also run tests marked matrix (make test-matrix runs them alone)",
    )
    parser.addoption(
        "--cluster",
        action="store_true",
        help="also run tests marked cluster (they bring up a Slurm of their own)",
    )


@pytest.hookimpl(optionalhook=True)  # a plain pytest serves without pytest-xdist
def pytest_xdist_auto_num_workers() -> int | None:
    """A process for each core and 3 GiB of memory, at most 12: then the longest file takes longer than the rest.

    One more, which would work while tests of hangs and kills wait, made tests of slow links fail.

    0: all in this process. None, where the environment has PYTEST_XDIST_AUTO_NUM_WORKERS: as many as that says.
    """
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    import psutil

    workers = min(cores, psutil.virtual_memory().available // (3 * 2**30), 12)
    return workers if workers > 1 else 0


def pytest_collection_finish() -> None:
    """From here on garbage is collected, and what was imported so far is not looked at again."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = {item for item in items if any(item.get_closest_marker(m) for m in LEFT_OUT)}
    if not marked:
        return
    has_gpu, no_cluster = False, "brings up a Slurm cluster: make test-cluster"
    if config.getoption("--cluster"):
        from tests.cluster.bed import why_not

        no_cluster = why_not()
    if any(item.get_closest_marker("gpu") for item in marked):
        import torch

        has_gpu = torch.cuda.is_available()
    for item in marked:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("cluster") and no_cluster:
            item.add_marker(pytest.mark.skip(reason=no_cluster))
        if item.get_closest_marker("matrix") and not config.getoption("--matrix"):
            item.add_marker(pytest.mark.skip(reason="further combinations: make test-matrix"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def no_waiting_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching a shard again waits 15 s in all."""
    monkeypatch.setattr("encoder.data.cache.BACKOFF_SECONDS", 0.0)
