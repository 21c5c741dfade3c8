"""RoBERTa's blocks of running text from lists of sentences, a token at a time.

A document is a list of sentences, a sentence a list of tokens. Nothing is known here of places in shards.
"""

from __future__ import annotations

from typing import Any

Sentence = list[Any]


def running_blocks(
    documents: list[list[Sentence]], *, most: int, whole_sentences: bool, cls: Any, sep: Any
) -> list[list[Any]]:
    """Blocks of at most `most` tokens: [CLS], text with a [SEP] behind each document, and a [SEP] at the end."""
    # what is laid as one: a sentence or a token, and whether its document ends with it
    units = [
        (unit, sentence is document[-1] and unit[-1:] == sentence[-1:] and last)
        for document in documents
        for sentence in document
        for unit, last in _units(sentence, whole_sentences)
    ]
    blocks: list[list[Any]] = []
    block: list[Any] = []
    for unit, ends in units:
        left = list(unit)
        while left:
            # a [SEP] closes the block, whether it is a document's or put back
            if len(block or [cls]) + len(left) + 1 <= most:
                block = (block or [cls]) + left
                left = []
            elif len(block) > 1:
                blocks.append(_closed(block, sep))
                block = []
            else:
                block = [cls, *left[: most - 2]]
                left = left[most - 2 :]
                if left:
                    blocks.append(_closed(block, sep))
                    block = []
        if ends:
            block.append(sep)
    if block:
        blocks.append(_closed(block, sep))
    return blocks


def _units(sentence: Sentence, whole: bool) -> list[tuple[Sentence, bool]]:
    if whole:
        return [(sentence, True)]
    return [([token], place == len(sentence) - 1) for place, token in enumerate(sentence)]


def _closed(block: list[Any], sep: Any) -> list[Any]:
    return block if block[-1] == sep else [*block, sep]
