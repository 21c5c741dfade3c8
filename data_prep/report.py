"""`data-prep report`: what shard folders hold, as a table, a histogram of lengths and some text read back."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.output import output
from data_prep.shards import read_shard
from data_prep.verify import find_shard_folders
from encoder.base.errors import ShardError
from encoder.base.files import native_path, refuse_foreign, write_atomic
from encoder.base.log import say
from encoder.base.untrusted import native_code
from encoder.data.shard_format import (
    INDEX,
    TOKENIZER,
    Card,
    as_read,
    check_index,
    read_card,
    read_hashes,
    read_index,
    read_lengths,
    tokenizer_fingerprint,
)

PICTURE, PAGE = "lengths.png", "report.html"
MADE_BY = "data-prep report"  # in both: what says so may be written over
SAMPLES, SAMPLE_CHARS = 3, 300
BAR_CHARS = 40
HEAD = ("source", "split", "samples", "tokens", "share", "mean", "median", "p95", "longest")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One shard folder in numbers, and the beginnings of a few samples."""

    folder: Path
    card: Card
    lengths: np.ndarray
    samples: list[str]


def report(folders: Sequence[Path], *, out: Path | None = None) -> None:
    """Print the report; with `out`, also write out/report.html and out/lengths.png. Raises ShardError."""
    found = [summarize(folder) for folder in find_shard_folders(folders)]
    rows = table(found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        # source and split to the left, numbers to the right
        words = [cell.ljust(w) for cell, w in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)]
        say("  ".join([*words, *numbers]))
    for summary in _shown(found):
        say(f"\n{summary.folder}: tokens per sample")
        for line in histogram(summary.lengths):
            say(f"  {line}")
        for text in summary.samples:
            say(f"  | {' '.join(text.split())}")
    if out:
        refuse_foreign(out / PAGE, ours=lambda head: MADE_BY.encode() in head)
        refuse_foreign(out / PICTURE, ours=lambda head: MADE_BY.encode() in head)
        picture = _picture(found)
        with output(out, [PICTURE, PAGE]):
            write_atomic(out / PICTURE, picture)
            write_atomic(out / PAGE, _page(rows, found, picture))
        say(f"\n{out / PAGE}")


def summarize(folder: Path) -> Summary:
    """Read a folder's card and lengths, and decode samples spread evenly over its first shard. Raises ShardError."""
    import tokenizers

    card = read_card(folder)
    if tokenizer_fingerprint(folder / TOKENIZER) != card.tokenizer_sha256:
        raise ShardError(
            f"{folder / TOKENIZER} is damaged: its SHA-256 is not the card's. Make the shards"
            " again."
        )
    # before any text is decoded: a folder that was changed has no meaning
    check_index(folder, card)
    lengths = np.asarray(read_lengths(folder, card))
    filled = next((entry for entry in read_index(folder) if entry["samples"]), None)
    if filled is None:
        raise ShardError(
            f"{folder / INDEX} lists no samples, the card of {card.documents:,}. Make the shards"
            " again."
        )
    shard = list(read_shard(folder, filled, card=card, hashes=read_hashes(folder, card)))
    what = f"{folder / TOKENIZER} is not a tokenizer that tokenizers can read"
    with native_path(folder / TOKENIZER) as name, native_code(what, error=ShardError):
        tokenizer = tokenizers.Tokenizer.from_file(name)
    # spread evenly over the shard
    chosen = [shard[i * len(shard) // SAMPLES] for i in range(min(SAMPLES, len(shard)))]
    read = [as_read(ids_T, card)[:SAMPLE_CHARS].tolist() for ids_T in chosen]
    with native_code(what, error=ShardError):
        texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in read]
    return Summary(
        folder=folder, card=card, lengths=lengths, samples=[t[:SAMPLE_CHARS] for t in texts]
    )


def table(found: Sequence[Summary]) -> list[tuple[str, ...]]:
    """Rows of cells, the head first. The share is of the tokens of the same split."""
    rows: list[tuple[str, ...]] = [HEAD]
    for s in found:
        of_split = sum(o.card.tokens for o in found if o.card.split == s.card.split)
        rows.append(
            (
                s.card.source,
                s.card.split,
                f"{s.card.documents:,}",
                f"{s.card.tokens:,}",
                f"{100 * s.card.tokens / of_split:.1f} %",
                f"{s.lengths.mean():,.0f}",
                f"{np.median(s.lengths):,.0f}",
                f"{np.percentile(s.lengths, 95):,.0f}",
                f"{s.lengths.max():,}",
            )
        )
    return rows


def histogram(lengths: np.ndarray) -> list[str]:
    """Lines 'up to 128 | #### 1,234 samples, 12.3 % of the tokens', in powers of two."""
    # powers of two from 32 to the first that the longest sample fits
    edges = [2**k for k in range(5, 64) if 2 ** (k - 1) < lengths.max()] or [32]
    lines, low, tokens = [], 0, int(lengths.sum(dtype=np.int64))
    counts = [
        int(np.sum((lengths > a) & (lengths <= b)))
        for a, b in zip([0, *edges], edges, strict=False)
    ]
    for high, count in zip(edges, counts, strict=True):
        share = int(lengths[(lengths > low) & (lengths <= high)].sum(dtype=np.int64)) / tokens
        bar = "#" * round(BAR_CHARS * count / max(counts))
        lines.append(
            f"up to {high:>6,} |{bar:<{BAR_CHARS}}| {count:>9,} samples, {100 * share:5.1f} % of"
            " the tokens"
        )
        low = high
    return lines


def _shown(found: Sequence[Summary]) -> Sequence[Summary]:
    """The folders to train on, or where there is none, all."""
    return [s for s in found if s.card.split == "train"] or found


def _picture(found: Sequence[Summary]) -> bytes:
    """PNG: the share of each folder's tokens by sample length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for s in _shown(found):
        # a sample counts by its tokens, so bars add up to 1
        weights = s.lengths / s.lengths.sum(dtype=np.int64)
        axes.hist(
            s.lengths,
            bins=np.geomspace(4, s.card.max_tokens_per_document + 1, 60).tolist(),
            weights=weights,
            histtype="step",
            label=s.card.source,
        )
    axes.set(xscale="log", xlabel="tokens per sample", ylabel="share of the source's tokens")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": MADE_BY})
    return buffer.getvalue()


def _table_row(row: Sequence[str], *, tag: str) -> str:
    cells = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row]
    return f"<tr>{''.join(cells)}</tr>"


def _samples_of(summary: Summary) -> str:
    head = f"<h3>{html.escape(summary.card.source)} {summary.card.split}</h3>"
    return head + "".join(f"<pre>{html.escape(text)}</pre>" for text in summary.samples)


def _page(rows: Sequence[tuple[str, ...]], found: Sequence[Summary], picture: bytes) -> str:
    head, *body = rows
    cells = "\n".join([_table_row(head, tag="th"), *(_table_row(row, tag="td") for row in body)])
    samples = "\n".join(map(_samples_of, found))
    return f"""<!doctype html><meta charset="utf-8"><title>Shards</title>
<meta name="generator" content="{MADE_BY}">
<style>body{{font:16px sans-serif;max-width:60em;margin:2em auto}} td,th{{padding:.2em .8em;text-align:right}}
pre{{white-space:pre-wrap;background:#f4f4f4;padding:.6em}} img{{max-width:100%}}</style>
<h1>Shards</h1><table>{cells}</table>
<img alt="tokens by sample length" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
{samples}
"""
