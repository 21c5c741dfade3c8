"""The demo's labelled texts: passages of its prose, each with the package that it was written for.

The passages of one document are all on one side, so that the probe cannot know a text by its neighbours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from encoder.base.files import write_atomic

PACKAGES = 4  # with most passages
WORDS = 24  # of a passage
PASSAGES = {"train": 100, "test": 50}  # of a package, at most
TEST_SHARE = 3  # of so many documents one is asked


def write_probe(prose: Path, folder: Path, *, shrink: float = 1.0) -> None:
    """Writes folder/test.jsonl, then folder/train.jsonl: {"text": ..., "label": "numpy"}.

    prose: prose.jsonl of the corpus
    folder: is made
    shrink: the passages of a package are divided by its square root
    """
    sides: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for line in prose.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        package = document["source"].split("/")[0]
        sides[_side(document["source"])].setdefault(package, []).extend(
            _passages(document["text"], package)
        )

    # packages that both sides have enough of
    sizes = Counter(
        {
            package: min(len(found), 2 * len(sides["test"].get(package, [])))
            for package, found in sides["train"].items()
        }
    )
    labels = [package for package, _ in sizes.most_common(PACKAGES)]
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("test", "train"):
        rows = [
            {"text": text, "label": label}
            for label in labels
            for text in sides[side][label][: round(PASSAGES[side] / shrink**0.5)]
        ]
        write_atomic(folder / f"{side}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _side(source: str) -> str:
    """Which side a document is on: a function of its name."""
    number = hashlib.sha256(source.encode()).digest()[0]
    return "train" if number % TEST_SHARE else "test"


def _passages(text: str, package: str) -> list[str]:
    """Neighbouring words, the package's own name left out: that would be no question."""
    words = [word for word in text.split() if not re.search(re.escape(package), word, re.I)]
    ends = range(WORDS, len(words) + 1, WORDS)
    return [" ".join(words[end - WORDS : end]) for end in ends]
