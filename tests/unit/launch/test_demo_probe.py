"""The demo's labelled texts: no document on both sides, no package's name in its passages, as many of each label."""

from __future__ import annotations

import json
from collections import Counter

from encoder.base.rng import generator
from launch.demo_probe import PACKAGES, PASSAGES, WORDS, write_probe


def test_passages_of_a_document_are_on_one_side_and_do_not_name_their_package(tmp_path):
    draw = generator(1, "prose")
    documents = []
    for package in ("alpha", "beta", "gamma", "delta", "small"):
        for number in range(2 if package == "small" else 60):
            words = [f"{package}{number}", f"d{package[:2]}{number}", "word", package.upper()]
            text = " ".join(draw.choice(words, 90)).replace("D" + package, "d")
            documents.append({"source": f"{package}/{number}.md", "text": text})
    prose = tmp_path / "prose.jsonl"
    prose.write_text("".join(json.dumps(d) + "\n" for d in documents))
    write_probe(prose, tmp_path / "probe")
    sides = {
        side: [json.loads(line) for line in (tmp_path / "probe" / f"{side}.jsonl").open()]
        for side in PASSAGES
    }
    for side, rows in sides.items():
        counts = Counter(row["label"] for row in rows)
        assert sorted(counts) == ["alpha", "beta", "delta", "gamma"] and len(counts) == PACKAGES
        assert 0 < max(counts.values()) <= PASSAGES[side]
        assert all(len(row["text"].split()) == WORDS for row in rows)
        assert not any(row["label"] in row["text"].lower() for row in rows)
    # a document's own word
    marks = [
        {word for row in rows for word in row["text"].split() if word.startswith("d")}
        for rows in sides.values()
    ]
    assert marks[0] and marks[1] and not marks[0] & marks[1]
