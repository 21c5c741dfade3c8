"""Texts to begin with, that fit what a folder's labels say."""

from __future__ import annotations

from encoder.tools.page.classify import NUMBER, problem_of
from encoder.tools.page.folders import Opened

FILL_MASK = (
    ("The capital of France is [MASK].",),
    ("She opened the [MASK] and read the first [MASK].",),
    ("for i in [MASK](len(values)):",),
)
REVIEWS = (
    "A fine film, warm and funny from its first scene to its last.",
    "Dull, and an hour too long.",
    "Not bad at all, but nothing that I would see twice.",
)
PAIRS = (
    ("A man is playing a guitar on a stage.", "A man is making music."),
    ("A man is playing a guitar on a stage.", "The stage is empty."),
)
MAILS = (
    "Congratulations! You have won a prize. Reply today to claim it.",
    "Shall we move the meeting to Thursday, ten o'clock?",
)
PLAIN = (
    "The bridge was closed on Sunday after the storm.",
    "Please send me the report before noon.",
)
TAGS = (
    ("Ada Lovelace was born in London and worked with Charles Babbage.",),
    ("def area(width, height): return width * height",),
)
TOWER = (
    "The Eiffel Tower in Paris was built from 1887 to 1889 by the company of Gustave Eiffel. It is"
    " 330 metres tall and was the tallest building in the world for 41 years."
)
SPAN = (("Who built the tower?", TOWER), ("How tall is it?", TOWER))
CHOICE = (
    (
        "The ground was wet in the morning.",
        "What happened in the night?",
        "It rained.\nThe sun was shining.\nNobody was at home.",
    ),
)
SIMILARITY = (
    ("A cat sits on the mat.\nA kitten rests on a rug.\nThe stock market fell on Monday.",),
    ("How do I reset my password?\nI cannot log in any more.\nWhat does delivery cost?",),
)
# words of labels -> texts that such a model was made for
BY_LABEL = (
    (("entail", "contradict", "equivalent", "paraphrase", "duplicate", "neutral"), PAIRS),
    (("spam", "ham"), MAILS),
    (("pos", "neg", "star"), REVIEWS),
)


def classify(opened: Opened) -> list[list[str]]:
    """Rows of (text, second text), by the names of the labels."""
    if problem_of(opened) == NUMBER:
        return [list(pair) for pair in PAIRS]
    labels = [str(label).lower() for label in opened.model.config.id2label.values()]
    for words, rows in BY_LABEL:
        if any(label.startswith(word) for label in labels for word in (*words, f"not_{words[0]}")):
            return [[row, ""] if isinstance(row, str) else list(row) for row in rows]
    return [[text, ""] for text in PLAIN]
