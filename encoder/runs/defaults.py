"""Settings that a run file leaves out, worked out from what it says, its shards, its first weights and its run folder.

    model.vocab_size 16,000            the shards' 15,987 tokens in whole 64s
    model.initializer_range 0.03953    sqrt(2 / (5 hidden_size))

A run that was started keeps what it was started with. The resolved run file in the run folder holds every value.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from encoder.base.errors import ConfigError, UserError
from encoder.base.schema import read_mapping, to_plain
from encoder.base.units import parse_tokens, short_count
from encoder.data.shard_format import Card, read_card
from encoder.data.windows import documents_per_window
from encoder.models.catalog import SYSTEMS, system_of
from encoder.models.contract import ModelConfig
from encoder.objectives.catalog import OBJECTIVES
from encoder.runs.config import Derived, RunConfig, old_meanings, run_of, todays_form
from encoder.runs.folder import CHECKPOINTS, LEDGER, RUN_FILE
from encoder.runs.short_forms import phases_of, run_folder
from encoder.runs.weights import model_facts, saved_run

SEED = 17
SYSTEM = "modernbert"
DOCUMENT_TOKENS = 1024  # ModernBERT's first phase
# rows of 16,384 are 99.7 % full of real text, and enough for one forward of a GPU
MOST_ROW_TOKENS = 16384
WINDOW_DOCUMENTS = 8192  # rows of 16,384 of real text are 99.7 % full
LEAST_WINDOW_DOCUMENTS = 256  # smaller windows leave rows half empty
ROWS_A_STEP = 8  # or more, so that ranks and micro-batches find rows to share
VOCAB_MULTIPLE = 64  # of the embedding's rows: what matrix products like
# of the run's first phase; ModernBERT's 3B are the most
WARMUP_SHARE, MOST_WARMUP_TOKENS = (
    0.02,
    3_000_000_000,
)
DECAY_SHARE = 0.2  # of the run's last phase (arXiv 2405.18392: 10 to 20 %)
# a run saves and is judged about so often, but not after fewer steps
TIMES = 20
LEAST_STEPS = 10
MOST_BETWEEN_TOKENS = 5_000_000_000
# ModernBERT-base: 50B of 1.719T, from 768 of 4,608 sequences
BATCH_WARMUP_SHARE, FIRST_BATCH_SHARE = (
    0.03,
    1 / 6,
)
# no value at all: None is one that a setting may have
UNKNOWN = object()


def with_defaults(mapping: dict[str, Any]) -> tuple[dict[str, Any], tuple[Derived, ...]]:
    """A long form with every setting that can be worked out, and what was worked out. Wrong values stay: the schema judges them."""
    filler = _Filler(copy.deepcopy(mapping))
    filler.fill_all()
    return filler.mapping, tuple(filler.found)


def settled(run: RunConfig) -> RunConfig:
    """The run once its sources' cards are on this machine: what was worked out without them is worked out again."""
    if run.given is None or not any(source.cache for source in run.all_sources()):
        return run
    return run_of(run.given, where=run.name)


def warnings_of(run: RunConfig) -> list[str]:
    """What a run file says against its shards and its first weights, a sentence each."""
    lines = []
    model = run.model
    card = next((c for c in map(_card_at, (s.folder for s in run.all_sources())) if c), None)
    if card and not (run.init_from or run.branch_from):
        needed = whole_vocabulary(card.vocab_size)
        if model.vocab_size > needed:
            smaller = dataclasses.replace(model, vocab_size=needed)
            more = model.parameter_counts().total - smaller.parameter_counts().total
            lines.append(
                f"model.vocab_size {model.vocab_size:,} is more than the shards'"
                f" {card.vocab_size:,} tokens: {short_count(more)} parameters that no text trains."
                f" Leave it out for {needed:,}."
            )
    source = run.init_from or run.branch_from
    there = _facts_of(source) if source else None
    if source and there is None:
        lines.append(
            f"{source} is not at hand: what follows from it, such as RoPE thetas, is shown by the"
            " defaults here, and is the model's own where the run starts."
        )
    if there:
        first = run.phases[0]
        for name, new in first.model.items():
            old = getattr(there, name, new)
            if old != new:
                lines.append(
                    f"{name} is {old:g} at {source} and {new:g} in phase {first.name}: the weights"
                    " were trained at another one. Leave it out to go on as they were trained."
                )
    return lines


def slow_precision_text(run: RunConfig, *, on_cuda: bool) -> str | None:
    """About fp32 on a GPU that has faster units."""
    if not on_cuda or run.engine.precision != "fp32":
        return None
    return (
        "engine.precision fp32 on CUDA computes without the units for bf16: 5 to 15 times as slow"
        " as autocast. Leave it out, or use precision: autocast."
    )


def whole_vocabulary(tokens: int) -> int:
    """Rows of the embedding for so many tokens: 15,987 -> 16,000."""
    return -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def initializer_range_of(hidden_size: int) -> float:
    """sqrt(2 / (5 hidden_size)), as Megatron draws weights; 768: 0.02282."""
    return float(f"{math.sqrt(2 / (5 * hidden_size)):.4g}")


class _Filler:
    """The mapping on its way to being whole."""

    def __init__(self, mapping: dict[str, Any]) -> None:
        self.mapping = mapping
        self.found: list[Derived] = []
        self.started: dict[str, Any] = {}

    def fill_all(self) -> None:
        """In the order in which one follows from another."""
        m = self.mapping
        if folder := run_folder(m):
            self.put(m, "out", folder, "from name")
        self.started = _started_settings(m.get("out"))
        self._fill_weights()
        self._fill_phases()
        self._fill_rows()
        self._fill_added()
        self._fill_intervals()

    def put(self, holder: dict[str, Any], dotted: str, value: Any, why: str) -> None:
        """A value for the last word of `dotted` in its holder, where there is none: the started run's, or this."""
        key = dotted.rpartition(".")[2]
        if key in holder:
            return
        before = _look_up(self.started, dotted)
        if before is not UNKNOWN:
            value, why = before, "as the run was started"
        elif value is UNKNOWN:
            return
        holder[key] = value
        self.found.append(Derived(key=dotted, value=value, why=why))

    def _fill_weights(self) -> None:
        m = self.mapping
        word = "branch_from" if m.get("branch_from") else "init_from"
        path = m.get(word)
        source = parent_seed = None

        if isinstance(path, str) and path:
            source = _facts_of(path)
            parent_seed = _seed_of(path) if source and word == "branch_from" else None

        if parent_seed is None:
            self.put(m, "seed", SEED, "the usual one")
        else:
            self.put(
                m,
                "seed",
                parent_seed + 1,
                f"another one than branch_from's {parent_seed}, which would bring the same order",
            )

        # a model that is left out is that of init_from or branch_from, with as many rows as the
        # shards' tokens need and the heads that the objective needs
        rows, why_rows = self._vocabulary_of(source, word) if source else (0, "")
        # on a resume the source may be gone
        whole: Any = UNKNOWN
        why = f"that of {word} {path}"
        if source:
            whole = {"system": system_of(source), **to_plain(source), "vocab_size": rows}
            whole |= self._heads_of(source)
            why += f", vocab_size {rows:,}: {why_rows}" * (rows != source.vocab_size)
        self.put(m, "model", whole, why)

        # asked again for the error, which says why nothing could be read
        if "model" not in m and isinstance(path, str) and path:
            try:
                model_facts(Path(path))
            except (UserError, OSError, ValueError) as error:
                raise ConfigError(
                    f"model is missing, and {word} does not tell it: {error}"
                ) from error

        model = m.get("model")
        # no mapping: the schema refuses it; the source's own: nothing is left open
        if not isinstance(model, dict) or model is whole:
            return
        model.setdefault("system", SYSTEM)
        if not isinstance(model["system"], str) or model["system"] not in SYSTEMS:
            return

        family = SYSTEMS[model["system"]]
        self._fill_objective(family, model["system"])
        # only rope has such settings as thetas: a learned table is in the weights
        if model.get("positions", "rope") == "rope":
            for name in family.PHASE_SETTINGS:
                value = getattr(source, name, UNKNOWN) if source else UNKNOWN
                self.put(model, f"model.{name}", value, f"the weights of {word} were trained at it")

        if source:
            self.put(model, "model.vocab_size", rows, why_rows)
            self.put(model, "model.initializer_range", source.initializer_range, f"that of {word}")
            for name, needed in self._heads_of(source).items():
                if needed != getattr(source, name):
                    self.put(model, f"model.{name}", needed, "what the objective needs")
            # where the source is as its family's defaults are, the schema fills in the same
            for key, value in to_plain(source).items():
                if value != getattr(family, key, None):
                    self.put(model, f"model.{key}", value, f"that of {word}")
            return

        self._fill_model_needs(model)
        card = next((c for c in map(_card_at, _folders(m)) if c), None)
        if card:
            self.put(
                model,
                "model.vocab_size",
                whole_vocabulary(card.vocab_size),
                f"the shards' {card.vocab_size:,} tokens in whole {VOCAB_MULTIPLE}s",
            )
        else:
            self.put(
                model,
                "model.vocab_size",
                family.vocab_size,
                "the family's own, until the shards are there",
            )

        rule = model.get("initialization", getattr(family, "initialization", "megatron"))
        width = model.get("hidden_size", family.hidden_size)
        if (
            rule == "megatron"
            and isinstance(width, int)
            and not isinstance(width, bool)
            and 0 < width < 2**31
        ):
            self.put(
                model,
                "model.initializer_range",
                initializer_range_of(width),
                "sqrt(2 / (5 hidden_size))",
            )

    def _vocabulary_of(self, source: ModelConfig, word: str) -> tuple[int, str]:
        """Rows of the embedding: the source's, more where tokens were added to the shards' tokenizer; and why."""
        edited = self.mapping.get("vocabulary")
        added = isinstance(edited, dict) and edited.get("added") in ("drawn", "mean")
        card = None
        if added:
            card = next((c for c in map(_card_at, _folders(self.mapping)) if c), None)
        if card is None or card.vocab_size <= source.vocab_size:
            return source.vocab_size, f"that of {word}"
        rows = whole_vocabulary(card.vocab_size)
        return rows, f"the shards' {card.vocab_size:,} tokens in whole {VOCAB_MULTIPLE}s"

    def _fill_objective(self, family: type[ModelConfig], system: str) -> None:
        """The one objective that trains all of a model of several networks."""
        own = getattr(family, "TRAINED_BY", None)
        objective = self.mapping.setdefault("objective", {}) if own else None
        if own and isinstance(objective, dict):
            self.put(objective, "objective.name", own[0], f"what trains a model.system {system}")

    def _fill_model_needs(self, model: dict[str, Any]) -> None:
        """What the objective needs of the model, where its family has such a setting."""
        word, needs = self._needs()
        family = SYSTEMS[model["system"]]
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(family)}
        for name, least in needs.items():
            if name in defaults and defaults[name] < least:
                self.put(model, f"model.{name}", least, f"objective {word} needs it")

    def _needs(self) -> tuple[Any, Mapping[str, int]]:
        """The objective's word, and the least values of settings that it needs."""
        objective = self.mapping.get("objective")
        word = objective
        if isinstance(objective, dict):
            word = objective.get("name")
        known = OBJECTIVES.get(word) if isinstance(word, str) else None
        return word, getattr(known, "model_needs", {})

    def _heads_of(self, source: ModelConfig) -> dict[str, bool]:
        """Whether each head that a stored model may have is needed here: it is drawn or left out."""
        _, needs = self._needs()
        return {name: bool(needs.get(name)) for name in source.growth().heads}

    def _fill_phases(self) -> None:
        m = self.mapping
        data = _mapping_at(m, "data")
        # rows and positions limit how long a document may be
        amounts = (_amount(data.get("row_tokens")), _amount(_most_positions(m.get("model"))))
        limits = [a for a in amounts if a]
        phases = list(phases_of(m))
        for number, phase in enumerate(phases):
            at = f"phases.{number}"
            self.put(
                phase,
                f"{at}.name",
                "main" if len(phases) == 1 else f"phase_{number + 1}",
                "its place",
            )
            self.put(
                phase,
                f"{at}.max_tokens_per_document",
                min([DOCUMENT_TOKENS, *limits]),
                (
                    "ModernBERT's first phase"
                    if DOCUMENT_TOKENS <= min(limits, default=DOCUMENT_TOKENS)
                    else "as long as rows and positions allow"
                ),
            )

            lr, tokens = phase.get("lr"), _amount(phase.get("tokens"))
            if not isinstance(lr, dict) or "schedule" in lr:
                continue
            self.put(lr, f"{at}.lr.schedule", "wsd", "warm-up, flat, decay")
            if lr["schedule"] != "wsd" or tokens is None:
                continue

            # only the run's first phase warms up; a branch goes on with a warm optimizer
            if number == 0 and not m.get("branch_from"):
                warmup = min(int(WARMUP_SHARE * tokens), MOST_WARMUP_TOKENS)
                self.put(
                    lr,
                    f"{at}.lr.warmup_tokens",
                    warmup,
                    f"{WARMUP_SHARE:.0%} of the phase, at most 3B",
                )
            # and only its last one decays
            if number == len(phases) - 1:
                self.put(
                    lr,
                    f"{at}.lr.decay_tokens",
                    int(DECAY_SHARE * tokens),
                    f"{DECAY_SHARE:.0%} of the last phase",
                )

    def _fill_rows(self) -> None:
        data, phases = self.mapping.get("data"), list(phases_of(self.mapping))
        if not isinstance(data, dict):
            return
        lanes = data.get("lanes", 1)
        lanes = lanes if isinstance(lanes, int) and lanes > 0 else 1

        # every size that a batch may have: a row must divide all of them
        amounts = [_amount(p.get("batch_tokens")) for p in phases]
        for warmup in [
            p["batch_warmup"] for p in phases if isinstance(p.get("batch_warmup"), dict)
        ]:
            given = [key for key in ("from_tokens", "increase_tokens") if key in warmup]
            amounts += [_amount(warmup[key]) for key in given]
        longest = max(
            (a for p in phases if (a := _amount(p.get("max_tokens_per_document")))),
            default=DOCUMENT_TOKENS,
        )

        # of each lane: a step has as many rows of each
        step = math.gcd(*(a // lanes for a in amounts if a)) if any(amounts) else 0
        row = row_tokens_of(step, longest_tokens=longest)
        self.put(
            data, "data.row_tokens", row, f"divides every batch, holds documents of {longest:,}"
        )

        # the run file's own row, where it has one
        row = _amount(data["row_tokens"]) or row
        window = window_documents_of(self.mapping, lanes=lanes)
        fewer = window if window < WINDOW_DOCUMENTS else UNKNOWN
        self.put(data, "data.window_documents", fewer, "a window goes through no source twice")

        for number, phase in enumerate(phases):
            warmup, batch, tokens = (
                phase.get("batch_warmup"),
                _amount(phase.get("batch_tokens")),
                _amount(phase.get("tokens")),
            )
            if isinstance(warmup, dict) and batch and tokens:
                # whole rows of every lane
                rows = max(1, int(FIRST_BATCH_SHARE * batch) // (row * lanes))
                self.put(
                    warmup,
                    f"phases.{number}.batch_warmup.from_tokens",
                    rows * row * lanes,
                    "a sixth of the batch",
                )
                self.put(
                    warmup,
                    f"phases.{number}.batch_warmup.over_tokens",
                    max(1, int(BATCH_WARMUP_SHARE * tokens)),
                    f"{BATCH_WARMUP_SHARE:.0%} of the phase",
                )

    def _fill_added(self) -> None:
        """Settings that a run which began before there were any goes on with as it was."""
        for dotted, before in old_meanings(self.mapping).items() if self.started else ():
            section, _, key = dotted.partition(".")
            holder = self.mapping.setdefault(section, {})
            if isinstance(holder, dict) and _look_up(self.started, dotted) is UNKNOWN:
                self.put(
                    holder, dotted, before, "as the run was started, before there was this setting"
                )

    def _fill_intervals(self) -> None:
        m = self.mapping
        phases = list(phases_of(m))
        tokens = [_amount(p.get("tokens")) or 1 for p in phases]
        batches = [_amount(p.get("batch_tokens")) or 1 for p in phases]

        every = min(
            max(sum(tokens) // TIMES, LEAST_STEPS * max(batches, default=1)), MOST_BETWEEN_TOKENS
        )
        why = f"a twentieth of the run, at least {LEAST_STEPS} steps, at most 5B"

        if isinstance(m.setdefault("checkpoints", {}), dict):
            self.put(m["checkpoints"], "checkpoints.every_tokens", every, why)

        if beside := _held_out_beside(m):
            if isinstance(m.get("evaluation"), dict):
                self.put(
                    m["evaluation"],
                    "evaluation.sources",
                    beside,
                    "the held-out documents beside the shards",
                )
            else:
                self.put(
                    m, "evaluation", {"sources": beside}, "the held-out documents beside the shards"
                )
        if isinstance(m.get("evaluation"), dict):
            self.put(m["evaluation"], "evaluation.every_tokens", every, why)


def _mapping_at(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping at a key; empty where something else stands."""
    found = mapping.get(key)
    return found if isinstance(found, dict) else {}


def window_documents_of(mapping: Mapping[str, Any], *, lanes: int) -> int:
    """Documents of a window that goes through no source twice, in any phase; at most WINDOW_DOCUMENTS.

    Two sources of 100 and 1,000 documents of the same length at equal weights: 200, raised to LEAST_WINDOW_DOCUMENTS.
    A mixture whose cards are not all there has no say.

    mapping: the long form of a run file.
    lanes: into how many each source is dealt.
    """
    most = WINDOW_DOCUMENTS
    for holder in (mapping.get("data"), *phases_of(mapping)):
        sources = _sources(holder)
        places = [_place_of(s) for s in sources]
        found = [_card_at(Path(place)) for place in places if isinstance(place, str)]
        cards = [card for card in found if card and card.tokens]
        weights = [s.get("weight", 1.0) for s in sources]
        # without all of its cards the shares of a mixture are not known
        if not cards or len(cards) < len(sources):
            continue
        with contextlib.suppress(ConfigError, TypeError):
            # documents of each source in a window of one: of n documents a window takes n * share
            shares = documents_per_window(cards, weights, 1)
            most = min(
                most,
                *(
                    int(card.documents / lanes / share)
                    for card, share in zip(cards, shares, strict=True)
                ),
            )
    return max(most, LEAST_WINDOW_DOCUMENTS)


def row_tokens_of(step_tokens: int, *, longest_tokens: int) -> int:
    """The capacity of a row: the largest divisor of a step with rows to share, or else the smallest that holds a document.

    step_tokens: what divides every batch (0: none is known); longest_tokens: documents that a row must hold.
    """
    if step_tokens < longest_tokens:
        return longest_tokens  # no row fits: the run file's check says so
    # the capacities of k = 1, 2, ... rows a step; 2^20 tries end a search of absurd sizes
    divisors = [
        step_tokens // k
        for k in range(1, min(step_tokens // longest_tokens, 2**20) + 1)
        if step_tokens % k == 0
    ]
    # at least 8 rows a step, and none longer than one forward of a GPU needs
    shared = [d for d in divisors if d <= min(MOST_ROW_TOKENS, step_tokens // ROWS_A_STEP)]
    if shared:
        return max(shared)
    return min(divisors)


def _most_positions(model: Any) -> Any:
    """The longest document of a model as it is given, or by its family's default."""
    if not isinstance(model, dict):
        return None
    system = model.get("system")
    family = None
    if isinstance(system, str):
        family = SYSTEMS.get(system)
    return model.get("max_position_embeddings", getattr(family, "max_position_embeddings", None))


def _sources(holder: Any) -> list[dict[str, Any]]:
    sources = holder.get("sources") if isinstance(holder, dict) else None
    return [s for s in (sources if isinstance(sources, list) else []) if isinstance(s, dict)]


def _folders(mapping: Mapping[str, Any]) -> Iterator[Path]:
    sources = _sources(mapping.get("data"))
    for phase in phases_of(mapping):
        sources = [*sources, *_sources(phase)]
    for source in sources:
        place = _place_of(source)
        if isinstance(place, str):
            yield Path(place)


def _place_of(source: Mapping[str, Any]) -> Any:
    """Where a source's card lies on this machine, if the run file says so."""
    return source.get("cache") or source.get("path")


def _held_out_beside(mapping: Mapping[str, Any]) -> list[dict[str, str]]:
    """SOURCE/held_out for every SOURCE/train of the mixture that has one with documents."""
    found = []
    for source in _sources(mapping.get("data")):
        path = source.get("path")
        if not isinstance(path, str) or source.get("cache") or Path(path).name != "train":
            continue
        beside = Path(path).parent / "held_out"
        if card := _card_at(beside):
            name = source.get("name")
            # an empty held_out folder is none
            found += (
                [{"path": str(beside), **({"name": name} if name else {})}]
                if card.documents
                else []
            )
    return found


def _card_at(folder: Path) -> Card | None:
    with contextlib.suppress(UserError, OSError, ValueError):
        return read_card(folder)
    return None


def _facts_of(path: str) -> ModelConfig | None:
    """The shape of a stored model, or None where there is none to be read: who needs it says so."""
    with contextlib.suppress(UserError, OSError, ValueError):
        return model_facts(Path(path))
    return None


def _seed_of(path: str) -> int | None:
    with contextlib.suppress(UserError, OSError, ValueError):
        return saved_run(Path(path)).seed
    return None


def _started_settings(out: Any) -> dict[str, Any]:
    """What the run folder was started with; empty for a folder that holds no run."""
    with contextlib.suppress(UserError, OSError, ValueError):
        folder = None
        if isinstance(out, str) and out:
            folder = Path(out)
        if folder and (folder / RUN_FILE).is_file():
            ledger = folder / LEDGER
            # run.yaml alone is of a start that failed before its first step
            if (folder / CHECKPOINTS).is_dir() or ledger.is_file() and ledger.stat().st_size:
                return todays_form(read_mapping(folder / RUN_FILE))
    return {}


def _look_up(mapping: Any, dotted: str) -> Any:
    at = mapping
    for part in dotted.split("."):
        if isinstance(at, dict) and part in at:
            at = at[part]
        elif isinstance(at, list) and part.isdecimal() and int(part) < len(at):
            at = at[int(part)]
        else:
            return UNKNOWN
    return at


def _amount(value: Any) -> int | None:
    """Tokens, or None for what is none: the schema refuses it."""
    with contextlib.suppress(ConfigError, ValueError, ArithmeticError):
        return parse_tokens(value)
    return None
