"""Probes during a run: what its weights tell about labelled texts, at every evaluation.

    evaluation:
      probes:
        - {name: sentiment, train: reviews/train.jsonl, test: reviews/test.jsonl}      metrics: probe_sentiment 0.71
        - {name: tuned, kind: finetune, train: reviews/train.jsonl, test: reviews/test.jsonl}    probe_tuned 0.78

linear      each rank embeds its share of the texts, as the mean of their last states; rank zero fits the regression
            (probe_scores.py)
finetune    all ranks train a copy (tuned_probe.py)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from encoder.base.agreement import all_ranks_agree
from encoder.base.batch import TokenBatch
from encoder.base.dist import World, sum_over_ranks
from encoder.base.errors import ConfigError, UserError
from encoder.base.stopping import StopFlag
from encoder.base.tokenizer_json import SpecialIds
from encoder.data.examples import ExampleDealing, Examples, NumberedBatch, in_order
from encoder.engine.engine import Engine
from encoder.nn.task_heads import pooled
from encoder.runs.config import FineTuneProbeConfig, ProbeConfig, RunConfig
from encoder.runs.facts import DataFacts
from encoder.train.answers import answered
from encoder.train.probe_scores import (
    LabelledTexts,
    check_labels,
    check_regression,
    linear_probe,
    majority,
    read_labelled,
)
from encoder.train.tuned_probe import Tuning, tuned_logits, tuning_of


@dataclass(frozen=True, kw_only=True)
class ProbeTexts:
    """The two sides of a probe, encoded; training texts come first. N of both."""

    name: str
    examples: Examples  # targets are numbers of classes, in the order of their names
    train_labels: list[str]
    test_labels: list[str]
    tuning: Tuning | None = None  # None: a linear probe

    @property
    def majority(self) -> float:
        """Accuracy of always saying the commonest label."""
        return majority(self.train_labels, self.test_labels)


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The probes of a run, and what those that take long listen to."""

    texts: Sequence[ProbeTexts] = ()
    stop: StopFlag | None = None


def read_probes(run: RunConfig, facts: DataFacts) -> list[ProbeTexts]:
    """The probes of a run, read, checked and encoded. Raises UserError that names the setting, or file and row."""
    if run.evaluation is None:
        return []
    return [_read(probe, number, run, facts) for number, probe in enumerate(run.evaluation.probes)]


def probe_numbers(
    probes: Sequence[ProbeTexts],
    engine: Engine,
    *,
    world: World,
    run: RunConfig,
    stop: StopFlag | None = None,
) -> dict[str, float]:
    """`probe_NAME`, the accuracy on the test texts of each probe; the same on every rank, all of which call this.

    probes: of the run
    engine: whose model is asked
    world: of this rank
    run: whose seed and micro-batches are used
    stop: once it is asked, a fine-tuning leaves, and its number is nan
    """
    numbers: dict[str, float] = {}
    for probe in probes:
        if probe.tuning is not None:
            numbers[f"probe_{probe.name}"] = _tuned_accuracy(
                probe, probe.tuning, engine, world=world, run=run, stop=stop
            )
            continue
        states_NC = _embedded(probe.examples, engine, world=world, run=run)
        accuracy = torch.zeros((), dtype=torch.float64, device=engine.device)
        # an error of rank zero ends all ranks, which else would wait for it
        with all_ranks_agree(world):
            if world.first:
                accuracy += _accuracy(probe, states_NC, seed=run.seed)
        # zero on the other ranks
        numbers[f"probe_{probe.name}"] = float(sum_over_ranks(accuracy))
    return numbers


def probes_text(probes: Sequence[ProbeTexts], numbers: dict[str, float]) -> str:
    """`  probe sentiment 71.2% (commonest label 50.9%)` for each."""
    parts = [
        f"  probe {probe.name} {numbers[f'probe_{probe.name}']:.1%}"
        f" (commonest label {probe.majority:.1%})"
        for probe in probes
    ]
    return "".join(parts)


def sha256_of_each(probes: Sequence[ProbeTexts]) -> dict[str, str]:
    """Of the encoded texts and their labels, by the probes' names: for the event of a start."""
    return {probe.name: probe.examples.sha256 for probe in probes}


def other_texts(probes: Sequence[ProbeTexts], before: Any) -> list[str]:
    """A sentence for each probe whose texts are others than at the start before.

    probes: of this start
    before: sha256_of_each, as the event of that start has it; anything else: it told none
    """
    told = before if isinstance(before, Mapping) else {}
    return [
        f"the texts of probe {name} are others than at the start before: probe_{name} is not to be"
        " compared with its numbers until then"
        for name, sha256 in sha256_of_each(probes).items()
        if told.get(name, sha256) != sha256
    ]


def framed_ids(
    tokenizer: Tokenizer, specials: SpecialIds, texts: Iterable[str], *, longest: int
) -> list[list[int]]:
    """The ids of each text in its frame, cut at its end; none of a text without a token.

    tokenizer: to which "[MASK]" in a text is six letters, as in the preparation of shards
    specials: the frame
    texts: N of them
    longest: tokens of a text, its frame included
    """
    before, behind = [*specials.before], [*specials.behind]
    room = longest - len(before) - len(behind)
    found = tokenizer.encode_batch([*texts], add_special_tokens=False)
    return [[*before, *e.ids[:room], *behind] if e.ids else [] for e in found]


def _read(probe: ProbeConfig, number: int, run: RunConfig, facts: DataFacts) -> ProbeTexts:
    where = f"evaluation.probes.{number}"
    longest = min(probe.max_tokens, run.model.max_position_embeddings)
    sides: list[LabelledTexts] = []
    try:
        for file in (probe.train, probe.test):
            side = read_labelled(
                Path(file), text=probe.text, label=probe.label, most=probe.most_rows
            )
            sides.append(side)
        train, test = sides
        check_labels(train.labels, test.labels)
        tuning = None
        if isinstance(probe, FineTuneProbeConfig):
            tuning = tuning_of(probe, run, facts.specials, labels=len({*train.labels}))
        else:
            check_regression()
    except UserError as error:
        raise ConfigError(f"{where} ({probe.name}): {error}") from error

    tokenizer = Tokenizer.from_file(str(facts.tokenizer_json))
    tokenizer.encode_special_tokens = True
    ids = framed_ids(tokenizer, facts.specials, [*train.texts, *test.texts], longest=longest)
    if not all(ids):
        raise ConfigError(
            f"{where} ({probe.name}): text {ids.index([]) + 1:,} of its files has no token; needed:"
            " texts that say something. Leave it out."
        )
    lengths = [len(one) for one in ids]
    classes = sorted({*train.labels})
    return ProbeTexts(
        name=probe.name,
        examples=Examples(
            name=probe.name,
            ids_A=np.concatenate([np.array(one, dtype=np.int32) for one in ids]),
            starts_N1=np.concatenate([[0], np.cumsum(lengths)]),
            value_P=np.searchsorted(classes, [*train.labels, *test.labels]),
        ),
        train_labels=train.labels,
        test_labels=test.labels,
        tuning=tuning,
    )


def _tuned_accuracy(
    probe: ProbeTexts,
    tuning: Tuning,
    engine: Engine,
    *,
    world: World,
    run: RunConfig,
    stop: StopFlag | None,
) -> float:
    """On the test texts; nan where the weights of a broken model are no numbers, or the run is asked to stop.

    probe, tuning: the texts, and what learns them
    engine, world, run, stop: as of probe_numbers
    """
    cut = len(probe.train_labels)
    train = probe.examples.some(0, cut)
    test = probe.examples.some(cut, len(probe.examples))
    logits_NK = tuned_logits(tuning, train, test, engine=engine, run=run, world=world, stop=stop)
    if not logits_NK.isfinite().all():
        return math.nan
    right_N = logits_NK.argmax(dim=1).numpy() == test.value_P
    return float(right_N.mean())


def _accuracy(probe: ProbeTexts, states_NC: Tensor, *, seed: int) -> float:
    """On the test texts; nan where the states of a broken model are no numbers."""
    if not states_NC.isfinite().all():
        return math.nan
    cut = len(probe.train_labels)
    return linear_probe(
        states_NC[:cut], probe.train_labels, states_NC[cut:], probe.test_labels, seed=seed
    )


def _embedded(examples: Examples, engine: Engine, *, world: World, run: RunConfig) -> Tensor:
    """States [N, C] in fp32 on the CPU: of each text the mean over its tokens, the frame's among them."""
    # the term of a forward that only keeps other ranks company
    term = engine.objective.terms[0]
    micro_batch = run.loader.micro_batch_rows * run.data.row_tokens
    dealing = ExampleDealing(world=world, micro_batch_tokens=micro_batch)
    mine: list[NumberedBatch] = in_order(examples, term=term, dealing=dealing)

    def means(model: Any, batch: TokenBatch) -> Tensor:
        first_M = batch.targets[term].index_M
        return pooled(model.hidden_states, batch, first_M, "mean").float()

    return answered(
        engine,
        mine,
        means,
        examples=examples,
        width=run.model.hidden_size,
        dtype=torch.float32,
    )
