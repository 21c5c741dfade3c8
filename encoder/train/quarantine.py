"""The steps of a phase without the shards that were lost: `loader.on_bad_shard: quarantine`.

A rank that meets a damaged shard tells the others before the step is trained. All write it on the list, leave its
documents out of their rows from this step on (a row keeps its address and its other documents) and make the step again.
So what is trained is a function of the run file, the position and the list; the list is in the run folder and in every
checkpoint, and a run that goes on from before a loss leaves the shard out from the same step again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from encoder.base.agreement import texts_of_all_ranks
from encoder.base.dist import max_over_ranks
from encoder.base.errors import DamagedShard, ShardError, UserError
from encoder.base.files import write_json
from encoder.base.untrusted import read_json
from encoder.data.loader import DataPosition, Loader, StepData
from encoder.data.shards import Source

LeftOut = tuple[tuple[int, int], ...]  # (number of the source in the mixture, shard)
QUARANTINE = "quarantine.json"
# of the tokens of a source; one shard of a small source may be more. Above it is no accident of storage
MAX_LOST_SHARE = 0.05
FINE, DAMAGED, OTHER = range(3)  # what a rank met


@dataclass(frozen=True, kw_only=True)
class LostShard:
    """A shard that a run leaves out from one of its steps on."""

    source: str
    shard: int  # its number in index.json
    file: str
    from_step: int
    documents: int  # lost in each epoch
    tokens: int
    reason: str


class Quarantine:
    """The lost shards of a run, the same list on every rank."""

    def __init__(self, folder: Path, saved: Sequence[dict[str, Any]]) -> None:
        """Of the run folder, or, where only a checkpoint was copied, as the checkpoint has them."""
        self.path = folder / QUARANTINE
        try:
            found = saved
            if self.path.exists():
                found = read_json(self.path, error=ShardError, root=list)
            self.lost = [LostShard(**values) for values in found]
        except (ShardError, TypeError) as error:
            raise ShardError(
                f"{self.path} cannot be read ({error}); needed: the list of shards that the run has"
                " left out. Put it back, or remove it: the checkpoint has one, too."
            ) from error

    def to_plain(self) -> list[dict[str, Any]]:
        """What a checkpoint saves."""
        return [asdict(lost) for lost in self.lost]

    def left_out(self, step: int, names: Sequence[str]) -> LeftOut:
        """What a step of this mixture leaves out."""
        return tuple(
            (names.index(x.source), x.shard)
            for x in self.lost
            if x.from_step <= step and x.source in names
        )

    def add(self, lost: LostShard, source: Source) -> None:
        """Raises ShardError where too much of the source is lost."""
        of_source = [x for x in self.lost if x.source == lost.source] + [lost]
        # one shard may always go, however large its share: a second one is held to the limit
        share = sum(x.tokens for x in of_source) / source.card.tokens
        if len(of_source) > 1 and share > MAX_LOST_SHARE:
            raise ShardError(
                f"{len(of_source)} damaged shards with {share:.1%} of the tokens of source"
                f" {lost.source}; at most {MAX_LOST_SHARE:.0%} are left out. The last:"
                f" {lost.reason}"
            )
        self.lost.append(lost)

    def write(self) -> None:
        """To the run folder, before a step is trained without them; rank zero."""
        write_json(self.path, self.to_plain())


class QuarantiningLoader:
    """The steps of one phase, from its loader; opened again where another shard is left out. Use it in `with`.

    `open_loader(position, left_out)` opens the phase's loader; `names` are those of its sources. With `stops` no further
    shard is left out. `on_shard_lost(lost)` is called for every loss, on every rank, and raises nothing.
    """

    def __init__(
        self,
        *,
        open_loader: Callable[[DataPosition, LeftOut], Loader],
        quarantine: Quarantine,
        names: Sequence[str],
        position: DataPosition,
        step: int,
        stops: bool,
        on_shard_lost: Callable[[LostShard], None],
    ) -> None:
        self._open_loader, self._quarantine, self._names = open_loader, quarantine, names
        self._position, self._step, self._stops, self._on_shard_lost = (
            position,
            step,
            stops,
            on_shard_lost,
        )
        self._left_out = quarantine.left_out(step, names)
        self._loader = open_loader(position, self._left_out)

    def next_step(self) -> StepData:
        """As Loader.next_step, called on every rank. Raises what cannot be left out, on the rank that met it."""
        while True:
            data: StepData | None = None
            error: UserError | OSError | None = None
            try:
                # the list has grown: the loader opens anew here, and the step is made again
                if (
                    left_out := self._quarantine.left_out(self._step, self._names)
                ) != self._left_out:
                    self._loader.close()
                    self._left_out, self._loader = (
                        left_out,
                        self._open_loader(self._position, left_out),
                    )
                data = self._loader.next_step()
            except (UserError, OSError) as problem:
                error = problem
            # with `stops` no rank asks the others: an error is raised where it was met
            if self._stops or not self._all_leave_out(error):
                if error is not None:
                    raise error
                assert data is not None, "there is a step or an error"
                # moves only with a step: a repeated try is of the same rows
                self._position = data.end
                self._step += 1
                return data

    def epochs_at(self, position: DataPosition) -> dict[str, float]:
        """As Loader.epochs_at."""
        return self._loader.epochs_at(position)

    def __enter__(self) -> QuarantiningLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()

    def _all_leave_out(self, error: Exception | None) -> bool:
        """Whether some ranks met damaged shards, and nothing else was met: now they are on the list."""
        mine = OTHER
        said = ""
        if error is None:
            mine = FINE
        elif isinstance(error, DamagedShard):
            mine = DAMAGED
            # 600 bytes: the texts travel in a table of fixed width
            reason = str(error).encode()[:600].decode(errors="ignore")
            said = json.dumps([error.source, error.shard, reason], ensure_ascii=False)

        # FINE < DAMAGED < OTHER: one rank with any other error, and nothing is left out
        if int(max_over_ranks(torch.tensor([mine]))[0]) != DAMAGED:
            return False

        # several ranks may have met the same shard; sorted, so that all lists are equal
        found = {
            (source, shard): reason
            for source, shard, reason in map(json.loads, filter(None, texts_of_all_ranks(said)))
        }
        for (name, shard), reason in sorted(found.items()):
            source = self._loader.sources[self._names.index(name)]
            first, end = source.documents_of(shard)
            lost = LostShard(
                source=name,
                shard=shard,
                file=source.file_of(first).name,
                from_step=self._step,
                reason=reason,
                documents=end - first,
                tokens=int(source.lengths[first:end].sum(dtype="int64")),
            )
            self._check_some_is_left(lost)
            self._quarantine.add(lost, source)
            self._on_shard_lost(lost)
        return True

    def _check_some_is_left(self, lost: LostShard) -> None:
        """Raises ShardError, the same on all ranks, where the mixture would have no document without this shard, too."""
        # (number of the source, shard) of all that would be lost, this one included
        gone = {
            *self._quarantine.left_out(self._step, self._names),
            (self._names.index(lost.source), lost.shard),
        }
        if len(gone) == sum(len(source.samples_per_shard) for source in self._loader.sources):
            raise ShardError(
                f"{lost.file} of source {lost.source} was the last shard of the mixture that could"
                f" be read: no document is left. {lost.reason}"
            )
