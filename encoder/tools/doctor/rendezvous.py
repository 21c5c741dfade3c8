"""Where the ranks of a doctor meet: a store on rank zero in which each says what it knows, with a limit on every wait.

A collective that one rank does not join hangs, or fails on all with nobody named; a key that is not there has a name.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from encoder.base.dist import World, meeting_place
from encoder.base.errors import ConfigError

LEAVE_SECONDS = 5.0


class Silent(Exception):
    """Rank zero did not answer in time."""


class Meeting:
    """Rank zero asks and tells, the others answer. `wait_seconds` is the longest that anyone waits for anyone."""

    def __init__(self, world: World, *, wait_seconds: float) -> None:
        """Raises Silent where rank zero cannot be reached, ConfigError without an address."""
        self.world, self.wait_seconds = world, wait_seconds
        if world.size == 1:
            self.store: dist.Store = dist.HashStore()
            return
        if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            address, port = os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"])
        elif place := meeting_place():
            address, port = place
        else:
            raise ConfigError(f"{world.size} ranks but no MASTER_ADDR and MASTER_PORT. Start with srun, deepspeed or torchrun, "
                              "or set them in the job script.")
        try:
            self.store = dist.TCPStore(address, port, world.size, is_master=world.first, wait_for_workers=False,
                                       timeout=datetime.timedelta(seconds=wait_seconds / 3))     # it tries twice, and rests between
        except (dist.DistError, RuntimeError) as error:
            if world.first:
                raise ConfigError(f"port {port} cannot be had ({str(error).splitlines()[0][:120]}). Another program has it: set "
                                  "another MASTER_PORT.") from error
            raise Silent(f"no answer from rank 0 at {address} port {port} for {wait_seconds:.0f} s") from error

    def say(self, what: str, value: Any) -> None:
        """This rank's word on something."""
        self._set(f"{what}/{self.world.rank}", value)

    def collect(self, what: str, *, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """Rank zero: what each rank (of `ranks`) said, by rank; those that said nothing in time are not in it."""
        end = time.monotonic() + self.wait_seconds
        return {rank: value for rank in (range(self.world.size) if ranks is None else ranks)
                if (value := self._get(f"{what}/{rank}", end - time.monotonic())) is not None}

    def tell(self, what: str, value: Any) -> None:
        """Rank zero, to all."""
        self._set(what, value)

    def hear(self, what: str) -> Any:
        """What rank zero told; it may have waited for others meanwhile. Raises Silent."""
        value = self._get(what, 1.5 * self.wait_seconds)
        if value is None:
            raise Silent(f"no word from rank 0 about {what} for {1.5 * self.wait_seconds:.0f} s")
        return value

    def share(self, what: str, value: Any) -> Any:
        """Rank zero's value, on every rank. Raises Silent."""
        if self.world.first:
            self.tell(what, value)
            return value
        return self.hear(what)

    def connect(self) -> dist.TCPStore:
        """Another connection to the store, for whom one call may hold it long. Raises RuntimeError."""
        return dist.TCPStore(self.store.host, self.store.port, self.world.size, is_master=False, wait_for_workers=False,
                             timeout=datetime.timedelta(seconds=self.wait_seconds / 3))

    def leave(self) -> None:
        """The store lives as long as rank zero: it goes last, or after 5 s, since some may have fallen silent."""
        self.say("left", True)
        if self.world.first:
            self.wait_seconds = min(self.wait_seconds, LEAVE_SECONDS)
            self.collect("left")

    def _set(self, key: str, value: Any) -> None:
        try:
            self.store.set(key, json.dumps({"value": value}))
        except (dist.DistError, RuntimeError) as error:
            raise Silent(f"rank 0 was lost ({str(error).splitlines()[0][:120]})") from error

    def _get(self, key: str, seconds: float) -> Any:
        try:
            # who has answered counts, also after another one has used up the time: a wait of 0 s may miss it on a busy machine
            if not self.store.check([key]):
                self.store.wait([key], datetime.timedelta(seconds=max(0.05, seconds)))
            return json.loads(self.store.get(key))["value"]
        except dist.DistStoreError:
            return None
        except (dist.DistError, RuntimeError) as error:
            raise Silent(f"rank 0 was lost ({str(error).splitlines()[0][:120]})") from error


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"MASTER_PORT is {text}. Needed: a whole number from 1 to 65535, the same on every rank.")
    return int(text)
