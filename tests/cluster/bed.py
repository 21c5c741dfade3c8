"""A real Slurm of several nodes on this machine, as tests use it; what it is made of stands in testbed/README.md.

bed.up(); job = bed.sbatch("--nodes=2", script, ...); bed.wait_for_end(job); bed.host("crash", "node2")
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTBED = Path(__file__).parent / "testbed"
PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "pgrep": "procps",
    "perl": "perl-base",
}
ROOT = Path(__file__).resolve().parents[2]


def why_not() -> str:
    """Why no cluster can be brought up here, or nothing."""
    if platform.system() != "Linux" or os.getuid() != 0:
        return "needs root on Linux, to make the cluster's nodes"
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    missing = sorted(
        {package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)}
    )
    return f"needs Debian's packages {' '.join(missing)}" if missing else ""


@dataclass(frozen=True, kw_only=True)
class Bed:
    """A cluster in `folder`: nodes node1, node2, ...; each says it has `cpus` CPUs and `gpus` GPUs, which are none."""

    folder: Path
    nodes: int = 4
    cpus: int = 4
    gpus: int = 2

    @property
    def env(self) -> dict[str, str]:
        """Of every command: the cluster's sbatch, srun, ... come first, one thread a rank, no network."""
        return {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "SLURM_TESTBED_DIR": str(self.folder),
            "SLURM_CONF": f"{self.folder}/etc/slurm.conf",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }

    def up(self) -> None:
        """Brings it up, or leaves it as it is if it is up."""
        self._run(TESTBED / "up.sh", "-n", self.nodes, "-c", self.cpus, "-g", self.gpus)

    def down(self) -> None:
        """Ends it and removes its files."""
        self._run(TESTBED / "down.sh")

    def host(self, action: str, name: str, *command: Any) -> str:
        """crash, boot, unplug, plug, stop-daemon, start-daemon, or exec with a command; what it printed."""
        return self._run(TESTBED / "host.sh", action, name, *command)

    def sbatch(
        self, *args: Any, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Submits; the id of the job."""
        return self._run("sbatch", "--parsable", *args, env=env, cwd=cwd).strip()

    def slurm(self, *command: Any) -> str:
        """Runs one of Slurm's commands; what it printed."""
        return self._run(*command)

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, ..."""
        words = self._run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def wait_for_end(self, job_id: str, *, seconds: float) -> str:
        """The state in which the job ended."""

        def ended() -> str:
            state = self.job(job_id)["JobState"]
            return (
                state
                if state
                in (
                    "COMPLETED",
                    "FAILED",
                    "CANCELLED",
                    "TIMEOUT",
                    "NODE_FAIL",
                    "OUT_OF_MEMORY",
                )
                else ""
            )

        return wait_until(ended, seconds=seconds, what=f"the end of job {job_id}")

    def heal(self) -> None:
        """Undoes what a test, also one that failed, has done to the cluster; all nodes are idle when it returns."""
        self._try(TESTBED / "host.sh", "start-daemon", "controller")
        self._try("scancel", "--user=root")
        for number in range(1, self.nodes + 1):
            for action in ("boot", "plug"):
                self._try(TESTBED / "host.sh", action, f"node{number}")
        drained = self._run("sinfo", "-hN", "-p", "test", "-t", "drain", "-o", "%N").split()
        if drained:
            self._run(
                "scontrol", "update", f"NodeName={','.join(sorted(set(drained)))}", "State=RESUME"
            )
        self.wait_for_idle()

    def wait_for_idle(self, *, seconds: float = 60.0) -> None:
        """All nodes are there and free."""

        def idle() -> bool:
            return (
                len(
                    self._run(
                        "sinfo", "-hN", "-p", "test", "-t", "idle", "--responding", "-o", "%N"
                    ).split()
                )
                == self.nodes
            )

        wait_until(idle, seconds=seconds, what="all nodes to be idle")

    def _try(self, *command: Any) -> None:
        """What fails where there is nothing to do: a node that runs is not booted."""
        subprocess.run([str(word) for word in command], env=self.env, cwd=ROOT, capture_output=True)

    def _run(
        self, *command: Any, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.env, **(env or {})},
            cwd=cwd or ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
        return done.stdout


def wait_until(true: Callable[[], Any], *, seconds: float, what: str, every: float = 0.1) -> Any:
    """Asks until the answer is true, and returns it; fails after some seconds."""
    end = time.monotonic() + seconds
    while True:
        answer = true()
        if answer:
            return answer
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(every)
