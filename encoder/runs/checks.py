"""Settings held against each other, against the shards' cards and against the rows that come of them, before a run starts.

    mistakes_of        what makes a run another one than its file says: refused, but for a run that has begun
    hints_of           settings without effect, and effects that nobody asked for: a sentence each

plan, doctor, submit and pretrain ask here. What a single setting may be is checked where it is declared.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoder.base.errors import ConfigError, ShardError
from encoder.base.units import counted
from encoder.data.order import SHARDS_PER_GROUP
from encoder.data.sentences import read_sentences
from encoder.data.shard_format import TOKENIZER, Card, read_card
from encoder.data.shards import open_source
from encoder.data.windows import documents_per_window
from encoder.objectives.contract import frame_text
from encoder.objectives.words import read_word_edges
from encoder.runs.config import PhaseConfig, RunConfig, SourceConfig
from encoder.runs.filling import Filling, fill_rows
from encoder.runs.phases import PlannedSteps, planned_steps
from encoder.runs.same import has_begun

POOR_FILL = 0.9  # of rows: real text in windows of thousands of documents fills 99.7 %
MANY_JUST_ABOVE = 0.1  # of the documents
JUST_ABOVE = 1.05  # times the length: cut in two halves for so little
MOST_STEP_ROWS = 2**20  # of a step over all ranks: 10^9 tokens in rows of 1,024
SELDOM_STEPS = 0.01  # steps of a phase without a masked token, from which on it is said
WORD_TOKENS = 1.5  # a word's, where no document can be read
DOCUMENTS_READ = 64


@dataclass(frozen=True)
class _Known:
    """A source whose card is there."""

    config: SourceConfig
    card: Card
    where: str  # of its setting: data.sources.0

    @property
    def name(self) -> str:
        return self.config.name or self.card.source


def check_settings(run: RunConfig) -> list[str]:
    """The mistakes of a run that has begun, which goes on; raises ConfigError for those of a new one."""
    mistakes = mistakes_of(run)
    if mistakes and not has_begun(Path(run.out)):
        raise ConfigError(" ".join(mistakes))
    return mistakes


def mistakes_of(run: RunConfig) -> list[str]:
    """What contradicts itself, the same on every rank that sees the same cards."""
    return [
        *_warmups_too_long(run),
        *_steps_too_large(run),
        *run.faults.mistakes(),
        *_text_in_both(run),
        *_rates_of_nothing(run),
        *_sentences_of_nothing(run),
        *_other_frames(run),
    ]


def hints_of(
    run: RunConfig, *, ranks: int, fillings: list[Filling | None] | None = None
) -> list[str]:
    """A sentence for everything that has no effect or one that nobody asked for.

    fillings: of each phase, where they were worked out already.
    """
    fillings = fillings or [fill_rows(run, phase) for phase in run.phases]
    steps = planned_steps(run, fills=[f.fill if f else 1.0 for f in fillings])
    hints = [
        *_without_effect(run),
        *_of_intervals(run, steps),
        *_of_phases(run, steps, ranks=ranks),
        *_of_splits(run),
        *_of_sources(run),
    ]
    for index, (phase, filling) in enumerate(zip(run.phases, fillings, strict=True)):
        if filling is not None:
            hints += _of_lengths(run, phase, filling)
        hints += _of_questions(run, phase, filling, steps, index)
    return list(dict.fromkeys(hints))


# mistakes ------------------------------------------------------------------------------------------------------------


def _warmups_too_long(run: RunConfig) -> Iterator[str]:
    for number, phase in enumerate(run.phases):
        warmup = phase.batch_warmup
        if warmup and warmup.over_tokens > phase.tokens:
            # tokens of a step at the end of the phase
            last = run.rows_at(phase, phase.tokens) * run.data.row_tokens
            yield (
                f"phases.{number}.batch_warmup.over_tokens {warmup.over_tokens:,} is more than the"
                f" phase's {phase.tokens:,} tokens: its batch would end at {last:,} and never reach"
                f" batch_tokens {phase.batch_tokens:,}. Shorten the warm-up, or lengthen the phase."
            )


def _text_in_both(run: RunConfig) -> Iterator[str]:
    # by the hash of the index, which has those of the shards: the same text under any path
    training = {known.card.index_sha256: known for known in _training(run)}
    for held_out in _held_out(run):
        if both := training.get(held_out.card.index_sha256):
            yield (
                f"{held_out.where} {held_out.config.folder} holds the text that {both.where}"
                f" ({both.name}) trains on: its loss would be no held-out loss. Name a folder of"
                " other text, such as the held_out beside train."
            )


def _sentences_of_nothing(run: RunConfig) -> Iterator[str]:
    """Text whose sentences are not known, or of which no pair can be made."""
    if not run.needs_sentences:
        return

    is_pairs = run.objective.pairs is not None
    groups = [list(_known(where, sources)) for where, sources in _mixtures(run)]
    # held-out documents are not joined
    held_out = list(_held_out(run)) if is_pairs else []
    asking = "this objective" if is_pairs else "data.join sentences"
    # said once: whoever prepares them again does so with all
    for known in itertools.chain(*groups, held_out):
        if not known.card.sentences_sha256:
            yield (
                f"{known.where} {known.config.folder} does not say where its sentences end, which"
                f" {asking} needs. Find them: data-prep index {known.config.folder}"
                f" --tokenizer {known.config.folder / TOKENIZER} --sentences."
            )
            return
    for group in groups if is_pairs else ():
        if group and not any(_has_pairs(known) for known in group):
            yield (
                f"{group[0].where}: no document of {group[0].config.folder} has two sentences, so"
                " every second one would be a random one. Use objective: {name: mlm}, or text of"
                " longer documents."
            )


def _other_frames(run: RunConfig) -> Iterator[str]:
    """Text whose [CLS] stands where the objective does not look for it."""
    needed = run.objective.frame
    for known in (*_training(run), *_held_out(run)):
        if needed not in (None, known.card.specials.frame):
            # said once: whoever prepares them again does so with all
            yield frame_text(f"{known.where} {known.config.folder}")
            return


def _has_pairs(known: _Known) -> bool:
    return read_sentences(known.config.folder, known.card).several_in_one()


# settings alone ------------------------------------------------------------------------------------------------------


def _without_effect(run: RunConfig) -> Iterator[str]:
    model, phases = run.model, run.phases
    if all(phase.sources for phase in phases):
        yield (
            "data.sources is read by no phase: each has sources of its own. Leave one of them out."
        )
    if all(phase.mask_share is not None for phase in phases) and _is_given(
        run, "objective", "mask_share"
    ):
        yield "objective.mask_share has no effect: each phase has a mask_share of its own."
    yield from run.objective.without_effect(lambda name: _is_given(run, "objective", name))

    training = itertools.chain.from_iterable(sources for _, sources in _mixtures(run))
    cached = [source for source in training if source.cache]
    if cached and run.data.shuffle_shards > SHARDS_PER_GROUP:
        yield (
            f"data.shuffle_shards {run.data.shuffle_shards}: so many shards of {cached[0].path} are"
            " fetched before its first documents are read. It is meant for shards on this machine."
        )
    for number, phase in enumerate(phases):
        share = run.mask_share_of(phase)
        if share.end is not None and share.end == share.start:
            yield (
                f"phases.{number}.mask_share_end {share.end:g} has no effect: it is the share that"
                " the phase begins with."
            )
        # max_lr is the rate at which weight_decay is lost: of nothing, nothing is lost
        if phase.max_lr is not None and run.weight_decay_of(phase) == 0:
            yield (
                f"phases.{number}.max_lr {phase.max_lr:g} has no effect: the phase's weight_decay"
                " is 0."
            )
    for where, sources in _mixtures(run):
        if len(sources) == 1 and sources[0].weight != 1.0:
            yield f"{where}.0.weight {sources[0].weight:g} has no effect: there is one source."
    longest = max(phase.max_tokens_per_document for phase in phases)
    yield from model.without_effect(
        lambda name: _is_given(run, "model", name), longest_tokens=longest
    )
    if run.init_from or run.branch_from:
        if _is_given(run, "model", "initializer_range"):
            yield "model.initializer_range has no effect: the weights come from a stored model."
    if run.device == "cpu" and run.engine.offload_optimizer == "cpu":
        yield (
            "engine.offload_optimizer cpu has no effect on device cpu: the optimizer is in the"
            " machine's memory."
        )


def _of_intervals(run: RunConfig, steps: PlannedSteps) -> Iterator[str]:
    # what was worked out here, and not written by a person, draws no hint
    total, derived = sum(phase.tokens for phase in run.phases), {d.key for d in run.derived}
    saves, checks = run.checkpoints.every_tokens, run.evaluation and run.evaluation.every_tokens
    if saves > total and "checkpoints.every_tokens" not in derived:
        yield (
            f"checkpoints.every_tokens {saves:,} is more than the run's {total:,} tokens: it saves"
            " at ends of phases alone, and a kill costs all since the last one."
        )
    elif _is_given(run, "checkpoints", "keep_last") and run.checkpoints.keep_last > max(
        2, total // saves + len(run.phases)
    ):
        yield (
            f"checkpoints.keep_last {run.checkpoints.keep_last} has no effect: the run saves"
            f" {total // saves} times."
        )

    # the last step stands for all
    step = steps[len(steps) - 1].tokens
    for key, every, what in (
        ("checkpoints", saves, "it saves"),
        ("evaluation", checks, "it is evaluated"),
    ):
        if every and every < step and len(steps) > 1 and f"{key}.every_tokens" not in derived:
            yield (
                f"{key}.every_tokens {every:,} is less than a step's {step:,} tokens: {what} after"
                " every step."
            )
    if checks and checks > total and _is_given(run, "evaluation", "every_tokens"):
        yield (
            f"evaluation.every_tokens {checks:,} is more than the run's {total:,} tokens: it is"
            " evaluated at the beginning and the end of phases alone."
        )
    if run.tracking.print_every_steps > len(steps) and _is_given(
        run, "tracking", "print_every_steps"
    ):
        yield (
            f"tracking.print_every_steps {run.tracking.print_every_steps} is more than the run's"
            f" {len(steps):,} steps."
        )

    most = max(len(steps.indices(index)) for index in range(len(run.phases)))
    if run.faults.spike and run.faults.spike.over_steps >= most:
        yield (
            f"faults.spike has no effect: it needs {run.faults.spike.over_steps} fine steps of a"
            f" phase, and the longest phase has {most:,}."
        )


def _of_phases(run: RunConfig, steps: PlannedSteps, *, ranks: int) -> Iterator[str]:
    model = run.model
    longest = max(phase.max_tokens_per_document for phase in run.phases)
    if model.max_position_embeddings > longest and _is_given(
        run, "model", "max_position_embeddings"
    ):
        what = "positions beyond are never trained, and an export would promise them"
        yield (
            f"model.max_position_embeddings {model.max_position_embeddings:,} is above the longest"
            f" documents of all phases, {longest:,}: {what}."
        )
    for number, phase in enumerate(run.phases):
        own = steps.indices(number)
        first, last = steps[own[0]], steps[own[-1]]
        if len(own) == 1:
            yield (
                f"phase {phase.name} is one step: its {phase.tokens:,} tokens are no more than one"
                " batch."
            )
            continue
        # not every schedule has them
        warmup, decay = (
            getattr(phase.lr, "warmup_tokens", 0),
            getattr(phase.lr, "decay_tokens", 0) or 0,
        )
        left_out = {d.key for d in run.derived}
        # a rate is taken at the middle of its step
        if 0 < warmup <= first.tokens // 2 and f"phases.{number}.lr.warmup_tokens" not in left_out:
            yield (
                f"phases.{number}.lr.warmup_tokens {warmup:,} has no effect: half of the first"
                f" step's {first.tokens:,} tokens, where its rate is taken, is beyond it."
            )
        told = f"phases.{number}.lr.decay_tokens" not in left_out
        if (
            told
            and 0 < decay <= last.tokens // 2
            and phase.tokens - decay > last.phase_tokens + last.tokens // 2
        ):
            yield (
                f"phases.{number}.lr.decay_tokens {decay:,} has no effect: it is below half of the"
                f" last step's {last.tokens:,}."
            )
        if phase.batch_warmup and phase.batch_warmup.over_tokens <= first.tokens:
            yield f"phases.{number}.batch_warmup is over after one step of {first.tokens:,} tokens."

    most = max(stretch.rows for stretch in steps.stretches)
    share = math.ceil(most / ranks)
    if run.loader.micro_batch_rows > share:
        yield (
            f"loader.micro_batch_rows {run.loader.micro_batch_rows} is more than the"
            f" {counted(share, 'row')} that a rank of {ranks} has of the largest step: a micro-batch"
            f" holds {share} at most."
        )


def _steps_too_large(run: RunConfig) -> Iterator[str]:
    """About a step that would assemble rows without end."""
    largest: dict[int, int] = {}
    for stretch in planned_steps(run, fills=[1.0] * len(run.phases)).stretches:
        largest[stretch.phase] = max(stretch.rows, largest.get(stretch.phase, 0))
    for number, rows in largest.items():
        if rows > MOST_STEP_ROWS:
            phase = run.phases[number]
            yield (
                f"phases.{number}.batch_tokens {phase.batch_tokens:,} makes a step of {rows:,} rows of"
                f" {run.data.row_tokens:,} tokens; needed: at most {MOST_STEP_ROWS:,} rows. Lower"
                f" phases.{number}.batch_tokens: the whole phase has {phase.tokens:,} tokens."
            )


def _rates_of_nothing(run: RunConfig) -> Iterator[str]:
    """About a run that would not move: a phase of one step takes its rate where the schedule has ended."""
    steps = planned_steps(run, fills=[1.0] * len(run.phases))
    if all(len(steps.indices(number)) == 1 for number in range(len(run.phases))) and not any(
        steps[steps.indices(number)[0]].lr for number in range(len(run.phases))
    ):
        phase = run.phases[0]
        yield (
            f"phases.0.tokens {phase.tokens:,} is one step of {phase.batch_tokens:,} tokens, at a"
            " learning rate of 0: nothing would be learned. Lower phases.0.batch_tokens, for"
            f" example to {run.data.row_tokens * run.data.lanes:,}, or train on more tokens."
        )


# against the cards ---------------------------------------------------------------------------------------------------


def _of_splits(run: RunConfig) -> Iterator[str]:
    for known in _training(run):
        if known.card.split == "held_out":
            yield (
                f"{known.where} {known.config.folder} is a held_out split by its card, and is"
                " trained on: nothing of it can tell how good the model is."
            )
    for known in _held_out(run):
        if known.card.split == "train":
            yield (
                f"{known.where} {known.config.folder} is a train split by its card: its loss is a"
                " held-out loss only if no phase of this model ever trained on it."
            )


def _of_sources(run: RunConfig) -> Iterator[str]:
    for where, sources in [
        *_mixtures(run),
        *([("evaluation.sources", run.evaluation.sources)] if run.evaluation else []),
    ]:
        seen: dict[str, _Known] = {}
        for known in _known(where, sources):
            # the first source of this text, which may be this one
            other = seen.setdefault(known.card.index_sha256, known)
            if other is not known:
                yield (
                    f"{known.where} ({known.name}) is the same text as {other.where}"
                    f" ({other.name}): it counts twice."
                )

    rows = 0
    if run.evaluation:
        rows = run.evaluation.rows
    for known in _held_out(run):
        asked = rows * run.data.row_tokens
        if known.card.tokens < asked and "evaluation" not in {d.key for d in run.derived}:
            yield (
                f"evaluation.rows {rows} asks for {asked:,} tokens of {known.name},"
                f" which has {known.card.tokens:,}: all of it is used."
            )

    for where, sources in _mixtures(run):
        all_known = [*_known(where, sources)]
        if len(all_known) < len(sources) or not all(k.card.tokens for k in all_known):
            continue
        # documents of each source in a window: more than it has, and it comes several times
        shares = documents_per_window(
            [k.card for k in all_known], [s.weight for s in sources], run.data.window_documents
        )
        small = [
            (k, share)
            for k, share in zip(all_known, shares, strict=True)
            if share > k.card.documents
        ]
        if small and "data.window_documents" not in {d.key for d in run.derived}:
            # the worst of them
            one, share = max(small, key=lambda pair: pair[1] / pair[0].card.documents)
            yield (
                f"data.window_documents {run.data.window_documents:,} is more than there is: a"
                f" window goes {float(share) / one.card.documents:.3g} times through the"
                f" {one.card.documents:,} documents of {one.name} ({where})."
            )


def _of_lengths(run: RunConfig, phase: PhaseConfig, filling: Filling) -> Iterator[str]:
    limit, lengths = phase.max_tokens_per_document, filling.lengths_D.astype(np.int64)
    longest = int(lengths.max())
    apart = run.data.join == "none"
    derived = {d.key for d in run.derived}
    key = f"phases.{run.phases.index(phase)}.max_tokens_per_document"
    if apart and longest * 2 <= limit and key not in derived:
        yield (
            f"phase {phase.name} cuts documents at {limit:,} tokens, and the longest of"
            f" {len(lengths):,} that were looked at has {longest:,}: none is cut, and no position"
            " beyond is trained."
        )

    # cut in two halves for 5 % too much, or for two tokens
    above = (lengths > limit) & (lengths <= max(limit + 2, JUST_ABOVE * limit))
    share = float(above.mean())
    if apart and share >= MANY_JUST_ABOVE:
        whole = int(lengths[above].max())
        # the same packed again with documents whole, to say what it would gain
        room = max(run.data.row_tokens, whole)
        other = fill_rows(run, phase, max_tokens=whole, row_tokens=room)
        rows = ""
        if room != run.data.row_tokens:
            rows = f" and data.row_tokens {room:,}"
        better = other.fill if other else 1.0
        yield (
            f"{share:.0%} of the documents of phase {phase.name} are just above"
            f" max_tokens_per_document {limit:,} and are cut in two halves: rows are"
            f" {filling.fill:.0%} full. max_tokens_per_document {whole:,}{rows} takes them whole"
            f" and fills rows to {better:.0%}."
        )
    elif filling.fill < POOR_FILL:
        few = (
            " A larger data.window_documents packs more of them together."
            if run.data.window_documents < 1024
            else ""
        )
        yield (
            f"rows of phase {phase.name} will be {filling.fill:.0%} full: its documents do not fill"
            f" rows of {run.data.row_tokens:,} tokens well. Longer rows are fuller.{few}"
        )


def _of_questions(
    run: RunConfig, phase: PhaseConfig, filling: Filling | None, steps: PlannedSteps, index: int
) -> Iterator[str]:
    """How many steps of a phase are likely to have no masked token."""
    if run.objective.asks_every_document:
        return
    share = run.mask_share_of(phase)
    # where the phase masks least
    lowest = min(share.start, share.end if share.end is not None else share.start)
    if filling is None:
        tokens_R, pieces_R = np.array([run.data.row_tokens]), np.array([1])
    else:
        tokens_R, pieces_R = filling.tokens_R, filling.pieces_R
    # of each word one draw where words are whole, of each token else; [CLS] and [SEP] are not asked
    units_R = np.maximum(0, tokens_R - 2 * pieces_R) / (
        _word_tokens(run, phase) if run.objective.needs_word_edges else 1.0
    )
    # a row has no masked token with probability (1 - rate)^units, a step of R rows with silent^R
    silent = float(np.mean((1.0 - lowest) ** units_R))
    own = [s for s in steps.stretches if s.phase == index]
    expected = sum(s.steps * silent**s.rows for s in own)
    if expected >= SELDOM_STEPS:
        count = sum(s.steps for s in own)
        amount = f"{expected:.2g}" if expected < 10 else f"{expected:,.0f}"
        yield (
            f"about {amount} of the {count:,} steps of phase {phase.name} will have no masked token"
            f" and move nothing: one step in {count / expected:,.0f}. A larger batch_tokens,"
            " data.row_tokens or mask_share makes them rarer."
        )


def _word_tokens(run: RunConfig, phase: PhaseConfig) -> float:
    """Mean tokens of a word in the first documents of a phase's first source that is on this machine."""
    for source in run.sources_of(phase):
        with contextlib.suppress(ShardError, ConfigError, OSError, ValueError):
            if source.cache:
                continue
            opened = open_source(source.folder, name="lengths of words")
            edges = read_word_edges(
                opened.path / "tokenizer.json", vocab_size=opened.card.vocab_size
            )
            words = tokens = 0
            for document in range(min(DOCUMENTS_READ, opened.documents)):
                ids = opened.read(document).astype(np.int64)
                # words are numbered from 0 in each document
                words, tokens = words + int(edges.words(ids)[-1]) + 1, tokens + len(ids)
            return tokens / words
    return WORD_TOKENS


# what is known -------------------------------------------------------------------------------------------------------


def _mixtures(run: RunConfig) -> Iterator[tuple[str, tuple[SourceConfig, ...]]]:
    """The mixtures that a phase trains on, and the setting of each."""
    # data.sources is trained on where some phase has no sources of its own
    if any(not phase.sources for phase in run.phases):
        yield "data.sources", run.data.sources
    yield from (
        (f"phases.{number}.sources", phase.sources)
        for number, phase in enumerate(run.phases)
        if phase.sources
    )


def _training(run: RunConfig) -> Iterator[_Known]:
    for where, sources in _mixtures(run):
        yield from _known(where, sources)


def _held_out(run: RunConfig) -> Iterator[_Known]:
    yield from _known("evaluation.sources", run.evaluation.sources if run.evaluation else ())


def _known(where: str, sources: tuple[SourceConfig, ...]) -> Iterator[_Known]:
    for number, source in enumerate(sources):
        with contextlib.suppress(ShardError):  # not there yet: a plan says so, a start refuses it
            yield _Known(source, read_card(source.folder), f"{where}.{number}")


def _is_given(run: RunConfig, *keys: str) -> bool:
    """Whether the run file itself has a setting, and not a default."""
    at: Any = run.given
    for key in keys:
        if not isinstance(at, dict) or key not in at:
            return False
        at = at[key]
    return True
