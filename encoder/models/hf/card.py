"""The model card of an export, README.md: what was trained, on what, proven how, and how to use it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from encoder.base.units import begun, with_article
from encoder.models.contract import ModelConfig
from encoder.models.hf.bridge import Bridge
from encoder.models.hf.parity import Proof
from encoder.models.hf.use import Named, Use

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the card."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a card says of how a model came to be."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    base_model: str | None = None  # a name on the Hugging Face hub


@dataclass(frozen=True, kw_only=True)
class Described:
    """The model of a card."""

    bridge: Bridge  # its class in transformers
    config: ModelConfig
    parameters: int  # trained numbers
    max_tokens: int  # of the longest text
    auto_class: str  # of transformers, that loads it


def write_card(
    folder: Path,
    *,
    described: Described,
    mask_token: str,
    training: Training,
    proofs: dict[str, Proof],
    shown_as: str,
) -> None:
    """Writes README.md; the license is left to be chosen by whoever publishes it.

    described: the model.
    mask_token: as the tokenizer spells it.
    training: what is known of its making.
    proofs: what was compared with whom.
    shown_as: the folder in the snippets.
    """
    model = {
        "parameters": f"{described.parameters:,}",
        **described.config.facts,
        "longest text": f"{described.max_tokens:,} tokens",
    }
    proven = [[asked, str(proof)] for asked, proof in proofs.items()]
    use = described.bridge.use(described.config)
    title = begun(with_article(described.bridge.title))
    named = Named(shown_as=shown_as, mask_token=mask_token, auto_class=described.auto_class)
    parts = [
        _front_matter(training.base_model, tag=described.bridge.model_type, use=use),
        f"# {plain(training.name)}\n",
        f"{title} {use.kind}, {use.says}\n",
        f"## Use\n\n```python\n{use.snippet(named)}```\n",
        _vectors_usage(named),
        table_text(Table(title="Model", head=("", ""), rows=list(model.items()))),
        table_text(Table(title="Training", head=("", ""), rows=list(training.facts.items()))),
        *(table_text(table) for table in training.tables),
        table_text(Table(title="Proof of the export", head=("asked", "gives"), rows=proven)),
        (
            "## Limits\n\nWhat was measured is the loss above. The vectors are those of a language"
            " model: they were not trained for similarity, and nothing was filtered from its"
            " answers.\n"
        ),
    ]
    # a folder in the snippets may have a name that is not UTF-8
    text = "\n".join(part for part in parts if part)
    (folder / CARD).write_text(text, encoding="utf-8", errors="backslashreplace")


def plain(text: object) -> str:
    """Text of a run's files as text of a card: one line, no table, link, code or HTML of its own."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(line, quote=False))


def _front_matter(base_model: str | None, *, tag: str, use: Use) -> str:
    lines = [
        "---",
        "# license: name one before you publish, for example apache-2.0",
        "library_name: transformers",
        f"pipeline_tag: {use.pipeline_tag}",
        *([f"base_model: {json.dumps(base_model)}"] if base_model else []),
        "tags:",
        f"- {tag}",
        f"- {use.task_tag}",
        "- sentence-transformers",
        "- tessera",
        "---",
    ]
    return "\n".join(lines) + "\n"


def _vectors_usage(named: Named) -> str:
    return f"""```python
from sentence_transformers import SentenceTransformer

{named.model_line}
vectors = SentenceTransformer(model).encode(["a text", "another text"])
print(vectors.shape)
```
"""


def table_text(table: Table) -> str:
    """A table in Markdown under its title; nothing of an empty one."""
    if not table.rows:
        return ""
    # a rule of dashes makes the first row a head in Markdown
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    text = f"## {plain(table.title)}\n\n"
    for line in lines:
        text += f"| {' | '.join(map(_cell, line))} |\n"
    return text


def _cell(text: str) -> str:
    if text == "---":
        return text
    return plain(text)
