"""Where the ranks of a doctor meet: a store on rank zero to which each publishes what it found, with a limit on every wait.

A collective that one rank does not join hangs, or fails on all with nobody named; a key that is not there has a name.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from encoder.base.dist import World
from encoder.base.errors import ConfigError
from encoder.base.world import meeting_address

LEAVE_SECONDS = 5.0


class RankTimeout(Exception):
    """Rank zero did not answer in time."""


class Rendezvous:
    """Rank zero collects and broadcasts, the others publish and receive.

    wait_seconds: the longest that any rank waits for another
    """

    def __init__(self, world: World, *, wait_seconds: float) -> None:
        """Raises RankTimeout if rank zero cannot be reached, ConfigError without an address."""
        self.world = world
        self.wait_seconds = wait_seconds
        self.store: dist.Store = dist.HashStore()
        if world.size == 1:
            return
        place = meeting_address(world)
        # a third: it tries twice, with a pause between
        timeout = datetime.timedelta(seconds=wait_seconds / 3)
        try:
            self.store = dist.TCPStore(
                place.host,
                place.port,
                world.size,
                is_master=world.first,
                wait_for_workers=False,
                timeout=timeout,
            )
        except (dist.DistError, RuntimeError) as error:
            if world.first:
                raise ConfigError(
                    f"port {place.port} cannot be had ({_first_line(error)}). Another program has"
                    " it: set another MASTER_PORT."
                ) from error
            raise RankTimeout(
                f"no answer from rank 0 at {place.host} port {place.port} for {wait_seconds:.0f} s"
            ) from error

    def publish(self, what: str, value: Any) -> None:
        """This rank's value of something."""
        self._set(f"{what}/{self.world.rank}", value)

    def collect(self, what: str, *, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """Rank zero: what each rank (of `ranks`) published, by rank; without those that did not in time."""
        end = time.monotonic() + self.wait_seconds
        # one deadline for all ranks together, not one for each
        found = {}
        for rank in range(self.world.size) if ranks is None else ranks:
            value = self._get(f"{what}/{rank}", end - time.monotonic())
            if value is not None:
                found[rank] = value
        return found

    def broadcast(self, what: str, value: Any = None) -> Any:
        """Rank zero's value, on every rank. Raises RankTimeout."""
        if not self.world.first:
            return self.receive(what)
        self._set(what, value)
        return value

    def receive(self, what: str) -> Any:
        """What rank zero broadcasts; it may have waited for others meanwhile. Raises RankTimeout."""
        # half as long again: rank zero may just have waited its whole time for a third rank
        value = self._get(what, 1.5 * self.wait_seconds)
        if value is None:
            raise RankTimeout(
                f"no word from rank 0 about {what} for {1.5 * self.wait_seconds:.0f} s"
            )
        return value

    def connect(self) -> dist.TCPStore:
        """Another connection to the store, for a caller that may hold it long. Raises RuntimeError."""
        timeout = datetime.timedelta(seconds=self.wait_seconds / 3)
        assert isinstance(self.store, dist.TCPStore), "one rank alone has no store to connect to"
        return dist.TCPStore(
            self.store.host,
            self.store.port,
            self.world.size,
            is_master=False,
            wait_for_workers=False,
            timeout=timeout,
        )

    def leave(self) -> None:
        """The store lives as long as rank zero: it goes last, or after 5 s, since some may have fallen silent."""
        self.publish("left", True)
        if self.world.first:
            self.wait_seconds = min(self.wait_seconds, LEAVE_SECONDS)
            self.collect("left")

    def _set(self, key: str, value: Any) -> None:
        try:
            self.store.set(key, json.dumps({"value": value}))
        except (dist.DistError, RuntimeError) as error:
            raise RankTimeout(f"rank 0 was lost ({_first_line(error)})") from error

    def _get(self, key: str, seconds: float) -> Any:
        """The value, or None if it did not come in time."""
        try:
            # a key that is there counts, also after another rank has used up the time: on a busy machine a wait of 0 s misses it
            if not self.store.check([key]):
                self.store.wait([key], datetime.timedelta(seconds=max(0.05, seconds)))
            return json.loads(self.store.get(key))["value"]
        except dist.DistStoreError:
            return None
        except (dist.DistError, RuntimeError) as error:
            raise RankTimeout(f"rank 0 was lost ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120]
