#!/usr/bin/env python3
"""Judge pretrained models side by side, without fine-tuning: runs, checkpoints, weights folders and Hugging Face folders.

    python launch/evaluate.py runs/small --texts held_out.jsonl
    python launch/evaluate.py ours=runs/small theirs=hf/laptop --texts held_out.jsonl --measures loss,pseudo,health
    python launch/evaluate.py runs/small --train reviews/train.jsonl --test reviews/test.jsonl --label label
    python launch/evaluate.py runs/small --pairs blimp.jsonl --by UID
    python launch/evaluate.py runs/small --texts books.jsonl --measures context --out results/small

loss      masked-token loss, perplexity, bits a byte       pseudo    each token masked alone
health    anisotropy, uniformity, rank of embeddings       probe     linear probe and nearest neighbours, by layer
context   loss against context length and position, and a needle
pairs     is the good sentence likelier than the bad one, as BLiMP asks
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from encoder.base.command import CommandLine, count, place, run_command
from encoder.base.errors import ConfigError
from encoder.base.files import atomic_folder, write_atomic, write_json
from encoder.base.paths import expand_path

if TYPE_CHECKING:
    from encoder.tools.evaluation.evaluate import Answers, Questions
    from encoder.tools.evaluation.minimal_pairs import SentencePairs
    from encoder.train.probe_scores import LabelledTexts

RESULT, TABLE, PICTURE = "evaluation.json", "table.md", "context.png"


def main(argv: list[str] | None = None) -> int:
    """Parses, asks every model, prints the table, returns the exit code."""
    args = _parser().parse_args(argv)

    def body() -> None:
        models = _named(args.models)
        questions = _questions(args)
        # imported here, so that --help and mistakes need no torch
        from encoder.base.tables import as_markdown, as_text
        from encoder.tools.evaluation.evaluate import as_json, evaluate
        from encoder.tools.evaluation.table import table

        # a folder that cannot be written is told before the models are asked
        with _folder(args.out) as out:
            answers = evaluate(models, questions, untrained=args.untrained)
            rows = table({answer.name: answer.numbers for answer in answers})
            if out is not None:
                write_json(out / RESULT, as_json(answers, questions))
                write_atomic(out / TABLE, as_markdown(rows))
                _draw(out / PICTURE, answers)
        print(as_text(rows))

    return run_command(body)


def _parser() -> CommandLine:
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="a run, a checkpoint, a weights folder or a Hugging Face folder; NAME heads its column",
    )
    parser.add_argument(
        "--texts",
        nargs="+",
        type=place,
        default=[],
        metavar="FILE",
        help="held-out text: .txt (a document a file), .jsonl, .csv, .tsv, .parquet, .arrow; globs",
    )
    parser.add_argument(
        "--measures",
        metavar="WORD,WORD",
        help="default: loss,health of texts, probe of labels, pairs of pairs",
    )
    parser.add_argument("--train", type=Path, metavar="FILE", help="labelled texts to learn from")
    parser.add_argument("--test", type=Path, metavar="FILE", help="labelled texts to be asked")
    parser.add_argument("--text", default="text", metavar="COLUMN", help="of the text (text)")
    parser.add_argument("--label", default="label", metavar="COLUMN", help="of the label (label)")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="rows of two sentences")
    parser.add_argument(
        "--good", metavar="COLUMN", help="of --pairs, the acceptable one (sentence_good)"
    )
    parser.add_argument("--bad", metavar="COLUMN", help="of --pairs, the other (sentence_bad)")
    parser.add_argument("--by", metavar="COLUMN", help="of --pairs: groups that count alike")
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="also ask each model's shape with drawn weights: what training has brought",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write everything there")
    for name, default, text in (
        ("--document-tokens", 128, "of a document, [CLS] and [SEP] included"),
        ("--most-tokens", 100_000, "of the text that the loss asks"),
        ("--most-texts", 1_000, "texts that are read"),
        ("--pseudo-tokens", 2_000, "of the text that pseudo-perplexity asks"),
        ("--context-tokens", None, "the longest context; default: the model's longest document"),
    ):
        shown = text if default is None else f"{text} (default {default:,})"
        parser.add_argument(name, type=count, default=default, metavar="N", help=shown)
    parser.add_argument(
        "--mask-share", type=float, default=0.15, metavar="P", help="of the tokens (default 0.15)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of masks and choices (default 0)")
    return parser


def _named(words: Sequence[str]) -> dict[str, str]:
    """NAME=MODEL; or MODEL, under the last part of its path, or the whole where two end alike. Raises ConfigError."""
    ends = Counter(Path(word).name for word in words if "=" not in word)
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        # a path may hold one, too
        if not equals or Path(expand_path(word)).exists():
            end = Path(word).name
            name = end if ends[end] == 1 else word
            path = word
        if name in found:
            raise ConfigError(f"two models are called {name}; needed: each once, or names of them.")
        found[name] = expand_path(path)
    return found


def _questions(args: argparse.Namespace) -> Questions:
    """What is asked, its texts read. Raises UserError."""
    pairs = _pairs(args)
    words = args.measures.split(",") if args.measures else _usual(args)
    if not words:
        raise ConfigError(
            "nothing is asked; needed: --texts FILE, --train FILE and --test FILE, or --pairs FILE. See"
            " --help."
        )
    from encoder.tools.evaluation.evaluate import OF_ROWS, Questions, check_measures

    measures = check_measures(words)
    plain = [measure for measure in measures if measure not in OF_ROWS]
    if plain and not args.texts:
        raise ConfigError(f"measure {plain[0]} needs texts. Give --texts FILE.")
    return Questions(
        measures=measures,
        texts=_read_texts(args.texts, args.text, args.most_texts),
        train=_labelled(args.train, args.text, args.label),
        test=_labelled(args.test, args.text, args.label),
        pairs=pairs,
        document_tokens=args.document_tokens,
        mask_share=args.mask_share,
        most_tokens=args.most_tokens,
        pseudo_tokens=args.pseudo_tokens,
        context_tokens=args.context_tokens,
        seed=args.seed,
    )


def _usual(args: argparse.Namespace) -> list[str]:
    found = []
    if args.texts:
        found += ["loss", "health"]
    if args.train or args.test:
        found.append("probe")
    if args.pairs:
        found.append("pairs")
    return found


def _read_texts(patterns: Sequence[str], column: str, most: int) -> list[str]:
    """The first texts of the files, in their order. Raises UserError."""
    from data_prep.readers import find_files
    from data_prep.readers.cures import told_of_options
    from data_prep.tokenizer_training import parsed_blocks, sources_of

    found: list[str] = []
    with told_of_options():
        for source in sources_of(patterns, text=column):
            for file in find_files(source, Path()):
                for parsed in parsed_blocks(source, file):
                    found += parsed.texts
                    if len(found) >= most:
                        return found[:most]
    return found


def _labelled(path: Path | None, text: str, label: str) -> LabelledTexts | None:
    """The rows of a file; a label is its word. Raises UserError."""
    if path is None:
        return None
    from encoder.train.probe_scores import read_labelled

    with _columns_are(("text", "label")):
        return read_labelled(path, text=text, label=label)


def _pairs(args: argparse.Namespace) -> SentencePairs | None:
    """Two sentences a row. Raises UserError."""
    if args.pairs is None:
        given = next((name for name in ("good", "bad", "by") if getattr(args, name)), None)
        if given:
            raise ConfigError(f"--{given} names a column of pairs. Give --pairs FILE, too.")
        return None
    from encoder.tools.evaluation.minimal_pairs import BAD, GOOD, read_pairs

    good, bad = args.good or GOOD, args.bad or BAD
    with _columns_are(("good", "bad", "by")):
        return read_pairs(args.pairs, good=good, bad=bad, by=args.by)


@contextlib.contextmanager
def _columns_are(options: Sequence[str]) -> Iterator[None]:
    """A column that a file does not have is named by one of these options. Raises DataError."""
    from encoder.data.labelled import NoColumn

    try:
        yield
    except NoColumn as error:
        named = ", ".join(f"--{option} COLUMN" for option in options)
        raise NoColumn(f"{error} Name columns by {named}.") from error


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path | None]:
    if out is None:
        yield None
        return
    with atomic_folder(out, mark=RESULT, ours=(RESULT, TABLE, PICTURE)) as part:
        yield part


def _draw(path: Path, answers: Sequence[Answers]) -> None:
    """The picture of long context, where it was asked."""
    scores = {answer.name: answer.context for answer in answers if answer.context is not None}
    if scores:
        from encoder.tools.evaluation.pictures import draw_context

        write_atomic(path, draw_context(scores))


if __name__ == "__main__":
    sys.exit(main())
