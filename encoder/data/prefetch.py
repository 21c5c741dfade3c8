"""Shards ahead of time: a thread of the main process keeps those of the coming windows in the caches, and from eviction.

It only makes things faster: a reader that does not find a shard fetches it itself, and what cannot be fetched is the
reader's to report.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import IO

from encoder.base.errors import ShardError
from encoder.data.shards import OPEN_SHARDS, Source
from encoder.data.windows import Windows


class Prefetch:
    """Fetches and holds what `lanes` need from their places on for `windows_ahead` more windows. Owns a thread: close it.

    Of each source and lane at most OPEN_SHARDS or a group more are held, each by an open file.
    """

    def __init__(
        self,
        *,
        sources: Sequence[Source],
        windows: Windows,
        lanes: Sequence[int],
        windows_ahead: int,
    ) -> None:
        self._sources, self._windows, self._lanes, self._ahead = (
            sources,
            windows,
            lanes,
            windows_ahead,
        )
        self._at: list[int] = []
        self._held: dict[tuple[int, int], IO[bytes]] = {}
        self._failed: set[tuple[int, int]] = set()
        self._changed = threading.Condition()
        # (source, shard), soonest first; None: closed
        self._wanted: list[tuple[int, int]] | None = []
        self._thread: threading.Thread | None = None

    def start(self, places: Sequence[tuple[int, int]]) -> None:
        """Have what the first windows of the lanes need, and go on in the background."""
        # the first windows are fetched here, before the first step asks for them
        self._wanted = self._needed(places, windows=1)
        self._bring(self._wanted)
        self.at(places)
        self._thread = threading.Thread(target=self._run, name="prefetch of shards", daemon=True)
        self._thread.start()

    def at(self, places: Sequence[tuple[int, int]]) -> None:
        """The run stands at (window, row) of each lane of the phase."""
        now = [places[lane][0] for lane in self._lanes]
        if now != self._at:
            self._at = now
            self._want(self._needed(places, windows=1 + self._ahead))

    def close(self) -> None:
        """End the thread, after the shard that it is fetching, and let go of all."""
        self._want(None)
        if self._thread is not None:
            self._thread.join()
        self._let_go(set())

    def _needed(self, places: Sequence[tuple[int, int]], *, windows: int) -> list[tuple[int, int]]:
        """Worked out in the main thread, which alone walks the order of documents."""
        # one queue for each lane and source that is read through a cache
        queues = []
        for lane in self._lanes:
            window, _ = places[lane]
            of_sources = self._windows.shards(window, windows, lane=lane, at_most=OPEN_SHARDS)
            for number, shards in enumerate(of_sources):
                if self._sources[number].cache is not None:
                    queues.append([(number, shard) for shard in shards])

        # the soonest shard of each queue, then the second of each: none of them runs dry alone
        in_turn = chain.from_iterable(zip_longest(*queues))
        return list(dict.fromkeys(key for key in in_turn if key is not None))

    def _want(self, wanted: list[tuple[int, int]] | None) -> None:
        with self._changed:
            self._wanted = wanted
            self._changed.notify()

    def _run(self) -> None:
        done: list[tuple[int, int]] | None = []
        while True:
            with self._changed:
                # compared by identity: an equal list that came anew is tried anew
                self._changed.wait_for(lambda: self._wanted is not done)  # noqa: B023
                done = self._wanted

            if done is None:
                return
            self._bring(done)

    def _bring(self, wanted: list[tuple[int, int]]) -> None:
        self._let_go(set(wanted))

        # first what no other process of this machine is fetching just now, then wait for the rest
        for wait in (False, True):
            for source, shard in wanted:
                # the run moved on: what it needs now goes before the rest of this list
                if self._wanted is not wanted:
                    return
                if (source, shard) in self._held or (source, shard) in self._failed:
                    continue

                try:
                    file = self._sources[source].hold(shard, wait=wait)
                except ShardError:
                    self._failed.add((source, shard))
                    continue
                if file is not None:
                    self._held[source, shard] = file
                elif wait:
                    # no room, until the run has moved on
                    return

    def _let_go(self, wanted: set[tuple[int, int]]) -> None:
        for key in self._held.keys() - wanted:
            self._held.pop(key).close()
