"""Cuts documents into passages at line ends, and mixes the passages of several files: what pairs of sentences are made of.

    python benchmarks/families/passages.py OUT.jsonl IN.jsonl [IN.jsonl ...] [--characters 2000]

Whole documents would not do. A held-out part of a few dozen books and a thousand web pages is nearly all web in its first pairs,
where B is of the same domain, whereas a training's B is mostly of another.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from encoder.base.command import CommandLine

SEED = 17


def main() -> None:
    """One file of passages."""
    asked = CommandLine(description=__doc__)
    asked.add_argument("out", type=Path)
    asked.add_argument("files", nargs="+", type=Path)
    asked.add_argument("--characters", type=int, default=2000, help="of a passage, about")
    args = asked.parse_args()

    found: list[str] = []
    for path in args.files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                found += passages(json.loads(line)["text"], characters=args.characters)
    random.Random(SEED).shuffle(found)
    with args.out.open("w", encoding="utf-8") as out:
        for text in found:
            out.write(json.dumps({"text": text}) + "\n")
    print(f"{args.out}: {len(found):,} passages")


def passages(text: str, *, characters: int) -> Iterator[str]:
    """The lines of a document, so many together that each passage but the last has at least `characters`."""
    kept: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        kept.append(line)
        size += len(line)
        if size >= characters:
            yield "".join(kept)
            kept = []
            size = 0
    if kept:
        yield "".join(kept)


if __name__ == "__main__":
    main()
