"""Questions and the passages that answer them, in BEIR's layout, and pairs to train on.

corpus.jsonl         {"_id": "p0", "title": "", "text": "a passage"}
queries.jsonl        {"_id": "q7", "text": "a question?"}
qrels/test.tsv       query-id  corpus-id  score         q7  p0  1
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from encoder.base.files import sha256_of
from encoder.base.rng import generator
from encoder.data.labelled import NO_NAME, DataError, Rows, read_rows

CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"
ANCHOR, POSITIVE, NEGATIVE = "anchor", "positive", "negative"
NEGATIVES = re.compile(rf"{NEGATIVE}(_[1-9][0-9]{{0,5}})?")
TITLE = re.compile("title")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """D passages."""

    ids: list[str]
    texts: list[str]  # title and text

    @property
    def place(self) -> dict[str, int]:
        """Number of a passage by its id."""
        return {name: number for number, name in enumerate(self.ids)}


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Q questions with what answers them."""

    ids: list[str]
    texts: list[str]
    # of each question: number of a passage -> grade above 0
    answers: list[dict[int, int]]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is trained on."""

    # anchor, positive, and negative or negative_1, negative_2, ...: as many texts each
    columns: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.columns[ANCHOR])


def read_corpus(folder: Path) -> Corpus:
    """The passages; a row without a title has its text alone. Raises DataError."""
    rows = _rows_by_id(folder / CORPUS, ["_id", "text"], optional=TITLE)
    titles = rows.columns.get("title", [""] * len(rows))
    texts = [
        f"{title or ''} {text}".strip()
        for title, text in zip(titles, rows.columns["text"], strict=True)
    ]
    return Corpus(ids=rows.columns["_id"], texts=_no_empty(rows, texts))


def read_questions(folder: Path, split: str, corpus: Corpus) -> Questions:
    """The questions of qrels/SPLIT.tsv, in the order of queries.jsonl. Raises DataError."""
    asked = _rows_by_id(folder / QUERIES, ["_id", "text"])
    texts = dict(zip(asked.columns["_id"], _no_empty(asked, asked.columns["text"]), strict=True))
    answers: dict[str, dict[int, int]] = {}
    place = corpus.place
    rows = read_rows(folder / "qrels" / f"{split}.tsv", ["query-id", "corpus-id", "score"])
    names = zip(*(rows.columns[key] for key in ("query-id", "corpus-id", "score")), strict=True)
    for number, (query, passage, score) in enumerate(names):
        if query not in texts:
            raise DataError(f"{rows.place(number)}: {QUERIES} has no {query!r}. Add it.")
        if passage not in place:
            raise DataError(f"{rows.place(number)}: {CORPUS} has no {passage!r}. Add it.")
        try:
            grade = int(score)
        except ValueError:
            raise DataError(
                f"{rows.place(number)}: score is {score!r}; needed: a whole number."
            ) from None
        if grade > 0:
            answers.setdefault(query, {})[place[passage]] = grade
    if not answers:
        raise DataError(f"{rows.path} names no answer: no score is above 0.")
    ids = [query for query in texts if query in answers]
    return Questions(
        ids=ids, texts=[texts[query] for query in ids], answers=[answers[query] for query in ids]
    )


def pairs_of(questions: Questions, corpus: Corpus) -> tuple[Pairs, list[tuple[int, int]]]:
    """A pair of each question with each of its answers, and their numbers."""
    numbers = [(q, d) for q, found in enumerate(questions.answers) for d in found]
    columns = {
        ANCHOR: [questions.texts[q] for q, _ in numbers],
        POSITIVE: [corpus.texts[d] for _, d in numbers],
    }
    return Pairs(columns=columns), numbers


def read_pairs(path: Path) -> Pairs:
    """Rows of anchor, positive, and negative or negative_1, negative_2, ... in all of them or in none. Raises DataError."""
    rows = read_rows(path, [ANCHOR, POSITIVE], optional=NEGATIVES)
    negatives = sorted({*rows.columns} - {ANCHOR, POSITIVE}, key=lambda name: (len(name), name))
    for name in negatives:
        lacking = [row for row, text in enumerate(rows.columns[name]) if text is None]
        if lacking:
            raise DataError(
                f"{rows.place(lacking[0])} has no {name}, and other rows have one. Give all of them"
                " one, or none."
            )
    names = [ANCHOR, POSITIVE, *negatives]
    return Pairs(columns={name: _no_empty(rows, rows.columns[name], name) for name in names})


def chosen(pairs: Pairs, most: int | None, *, seed: int) -> list[int]:
    """Numbers of the pairs that are trained on, ascending."""
    if most is None or most >= len(pairs):
        return [*range(len(pairs))]
    order = generator(seed, "embed pairs").permutation(len(pairs))
    return sorted(int(number) for number in order[:most])


def some(pairs: Pairs, numbers: list[int]) -> Pairs:
    """These pairs."""
    return Pairs(columns={k: [texts[n] for n in numbers] for k, texts in pairs.columns.items()})


def hashes_of(folder: str | None, pairs: str | None, splits: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of every file that is read, by what it is for: corpus, queries, qrels/test, pairs."""
    files: dict[str, Path] = {}
    if folder:
        files |= {"corpus": Path(folder) / CORPUS, "queries": Path(folder) / QUERIES}
        files |= {f"qrels/{split}": Path(folder) / "qrels" / f"{split}.tsv" for split in splits}
    if pairs:
        files["pairs"] = Path(pairs)
    return {role: sha256_of(path) for role, path in files.items()}


def _rows_by_id(path: Path, names: Sequence[str], optional: re.Pattern[str] = NO_NAME) -> Rows:
    """Rows whose ids are texts, each once."""
    rows = read_rows(path, names, optional=optional)
    ids = [str(value) for value in rows.columns["_id"]]
    seen: set[str] = set()
    for number, name in enumerate(ids):
        if name in seen:
            raise DataError(f"{rows.place(number)}: the id {name!r} stands twice. Write it once.")
        seen.add(name)
    return Rows(
        path=rows.path,
        columns={**rows.columns, "_id": ids},
        word=rows.word,
        numbers=rows.numbers,
    )


def _no_empty(rows: Rows, texts: list[str], name: str = "text") -> list[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{rows.place(number)}: {name} is empty, or no text. Mend it.")
    return texts
