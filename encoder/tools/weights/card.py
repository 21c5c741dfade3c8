"""What the card of an export says of the run that trained its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from encoder.base.hub import parse_hub_name
from encoder.base.units import short_count
from encoder.engine.checkpoint.folder import COMMITTED
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress
from encoder.models.hf.card import Table, Training
from encoder.models.stored import StoredModel
from encoder.runs.about import what_was_trained
from encoder.runs.config import schedule_word
from encoder.runs.folder import CHECKPOINTS, METRICS, RUN_FILE, merged_metrics
from encoder.runs.weights import saved_run

HELD_OUT = ("held_out_loss", "held_out_accuracy")


def training_of(source: Path, model: StoredModel, *, name: str) -> Training:
    """Facts, phases and held-out losses of a run or checkpoint; of another model, where it came from.

    source: a run folder, a checkpoint, a weights folder or a Hugging Face folder.
    model: what was read from it.
    name: the card's title where there is no run.

    Paths of the machine that trained are left out: a card is made to be published.
    """
    checkpoint = checkpoint_of(source)
    if checkpoint is None:
        return Training(name=name, facts={"origin": model.origin})
    run, folder = saved_run(checkpoint), checkpoint.parent.parent
    progress, _ = read_progress(checkpoint)
    # up to this checkpoint: the run may have gone on since
    metrics = [m for m in merged_metrics(folder / METRICS) if m["step"] <= progress.step]
    nothing: dict[str, Any] = {}
    last = next((m for m in reversed(metrics) if "held_out_loss" in m), nothing)
    facts = {
        "origin": model.origin,
        "trained": f"{progress.step:,} steps, {short_count(progress.tokens)} tokens",
        **what_was_trained(run, folder),
        "ledger": f"{progress.ledger_hash} after step {progress.step:,}",
    }
    held_out = [
        [key.replace("_", " "), f"{value:.2%}" if "accuracy" in key else f"{value:.3f} nats"]
        for key, value in last.items()
        if key.startswith(HELD_OUT) and isinstance(value, (int, float))
    ]
    phases = [
        [
            p.name,
            short_count(p.tokens),
            f"{p.max_tokens_per_document:,}",
            *run.model_of(p).phase_texts.values(),
            f"{schedule_word(p)}, peak {p.lr.peak:g}",
            short_count(p.batch_tokens),
        ]
        for p in run.phases
    ]
    head = (
        "phase",
        "tokens",
        "longest text",
        *run.model_of(run.phases[0]).phase_texts,
        "rate",
        "tokens per step",
    )
    name_on_hub = parse_hub_name(run.init_from) if run.init_from else None
    return Training(
        name=run.name,
        facts=facts,
        tables=(
            Table(title="Phases", head=head, rows=phases),
            Table(
                title="Held-out text",
                head=("", f"after step {last.get('step', 0):,}"),
                rows=held_out,
            ),
        ),
        base_model=name_on_hub.id if name_on_hub else None,
    )


def checkpoint_of(source: Path) -> Path | None:
    """The checkpoint that a model is read from; None for a model that lies by itself. Of a run folder its files are hashed."""
    if (source / COMMITTED).exists():
        return source
    if (source / CHECKPOINTS).is_dir() or (source / RUN_FILE).is_file():
        return newest_checkpoint(source / CHECKPOINTS)
    return None
