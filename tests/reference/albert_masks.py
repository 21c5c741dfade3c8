"""ALBERT's choice of n-grams on plain lists, as create_pretraining_data.py makes it: the slow twin of objectives.masking."""

from __future__ import annotations


def covered_by(
    units: list[list[int]], order: list[int], drawn: list[int], number: int
) -> list[list[int]]:
    """The n-grams that are masked, each as its token positions.

    units: token positions of each word
    order: first words, in the shuffled order
    drawn: words of the n-gram that begins at each of them
    number: tokens to predict, num_to_predict there
    """
    masked: list[int] = []
    grams: list[list[int]] = []
    for first, n in zip(order, drawn):
        if len(masked) >= number:
            break
        gram = sum(units[first : first + n], [])
        while len(masked) + len(gram) > number:
            if n == 0:
                break
            n -= 1
            gram = sum(units[first : first + n], [])
        if not gram or len(masked) + len(gram) > number:
            continue
        if any(position in masked for position in gram):
            continue
        masked += gram
        grams.append(gram)
    return grams
