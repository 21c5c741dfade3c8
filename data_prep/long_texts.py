"""Long texts in parts that give the ids of the whole: cut where no tokenizer of a known structure joins two characters.

    ... ends with a word| and the next part begins with the space before a word ...
                      ^ letter, then one space or line end, then letter

At such a place a known pre-tokenizer ends a piece whatever stands before and behind: its rules take a letter run, or one
space with the letter run behind it, and never look past a letter. No normalizer of the known ones joins a letter with a
space, and no added token that is matched in text holds both. A tokenizer of any other structure gets whole texts.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_UNCUT_CHARS = 2**22  # encoded at once: 0.2 GB by fastokens, 0.9 GB by tokenizers
# a cut is looked for in so many characters before the end of a part, then in all
SEARCH_CHARS = 2**12

_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer")
_PRE_TOKENIZERS = (
    "ByteLevel",
    "BertPreTokenizer",
    "Whitespace",
    "WhitespaceSplit",
    "Digits",
    "Punctuation",
)
_MODELS = ("BPE", "WordPiece", "WordLevel")
# the splits of GPT-2, of Llama 3 (up to 3 digits) and of Qwen2 (single digits)
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _LETTERS % "{1,3}",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _LETTERS % "",
)
# [^\W\d_] is a letter
_CUT = re.compile(r"(?<=[^\W\d_])[ \n](?=[^\W\d_])")
# full stop and commas of Chinese and Japanese
_CUT_AT_MARKS = re.compile(r"(?<=[^\W\d_])[ \n\u3002\u3001\uff0c](?=[^\W\d_])")


class TooLong(Exception):
    """A text that would have to be encoded as a whole, and is too long for that."""


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Where a tokenizer's texts may be cut."""

    place: re.Pattern[str] | None  # None: nowhere


def cuts_of(tokenizer_json: Path) -> Cuts:
    """The cuts of a tokenizer.json; nowhere for a structure that is not known, or a file that cannot be read."""
    try:
        content = json.loads(tokenizer_json.read_bytes())
        return Cuts(place=_place_of(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Cuts(place=None)


def _place_of(content: dict[str, Any]) -> re.Pattern[str] | None:
    normalizers = _steps(content.get("normalizer"), "normalizers")
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    # of anything else it is not known which characters it joins
    if content["model"].get("type", "BPE") not in _MODELS or any(
        step["type"] not in _NORMALIZERS for step in normalizers
    ):
        return None
    if not all(step["type"] in _PRE_TOKENIZERS or _is_known_split(step) for step in steps):
        return None
    # Digits and Punctuation, and ByteLevel without its rule, end no word at a space
    splits = [
        step
        for step in steps
        if step["type"] in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Split")
        or step["type"] == "ByteLevel"
        and step.get("use_regex", True)
    ]
    if not splits:
        return None

    # a token matched in text, with white space inside or taken in from beside, might lie over a cut
    for token in content.get("added_tokens", []):
        words = token["content"]
        if not token["special"] and (
            token["rstrip"] or token["lstrip"] or words.strip() and words.split() != [words]
        ):
            return None
    # WhitespaceSplit ends no word at a mark
    if any(step["type"] == "WhitespaceSplit" for step in steps):
        return _CUT
    return _CUT_AT_MARKS


def _steps(given: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """A step, or those of a sequence."""
    if given is None:
        return []
    return given[inside] if given["type"] == "Sequence" else [given]


def _is_known_split(step: dict[str, Any]) -> bool:
    if step["type"] != "Split" or step.get("invert") or step.get("behavior") != "Isolated":
        return False
    return step["pattern"].get("Regex") in _SPLITS


def parts_of(text: str, cuts: Cuts, *, most_chars: int) -> Iterator[str]:
    """The text in parts of at most `most_chars`, or where no cut lies so near, of up to MOST_UNCUT_CHARS. Raises TooLong."""
    begin = 0
    while len(text) - begin > most_chars:
        # the last cut within `most_chars`, else the first one behind
        end = _cut_before(text, cuts, begin + most_chars, begin + 1) or _cut_behind(
            text, cuts, begin + most_chars, begin + MOST_UNCUT_CHARS
        )
        if end is None:
            # without a cut the rest is one part, if it is not too long for that
            if len(text) - begin > MOST_UNCUT_CHARS:
                raise TooLong
            break
        yield text[begin:end] if begin or end < len(text) else text
        begin = end
    yield text[begin:] if begin else text


def _cut_before(text: str, cuts: Cuts, end: int, least: int) -> int | None:
    """The last cut before `end`."""
    if cuts.place is None:
        return None
    # most cuts lie near the end, so a short stretch is looked at first
    for begin in (max(least, end - SEARCH_CHARS), least):
        found = [
            match.start()
            for match in cuts.place.finditer(text, begin, end)
            if _is_between_letters(text, match.start())
        ]
        if found:
            return found[-1]
    return None


def _cut_behind(text: str, cuts: Cuts, begin: int, end: int) -> int | None:
    """The first cut after `begin`."""
    if cuts.place is None:
        return None
    matches = cuts.place.finditer(text, begin, min(end, len(text)))
    return next(
        (match.start() for match in matches if _is_between_letters(text, match.start())), None
    )


def _is_between_letters(text: str, at: int) -> bool:
    return _is_letter(text[at - 1]) and _is_letter(text[at + 1])


def _is_letter(character: str) -> bool:
    """A letter that stays letters, and nothing else, however it is normalized."""
    return character.isalpha() and unicodedata.normalize("NFKD", character).isalpha()


def by_chars(texts: Iterable[str], *, most_chars: int) -> Iterator[list[str]]:
    """Texts by at most `most_chars` at a time, a longer one alone."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        if batch and chars + len(text) > most_chars:
            yield batch
            batch = []
            chars = 0
        batch.append(text)
        chars += len(text)
    if batch:
        yield batch


def batches(
    texts: Sequence[str], cuts: Cuts, *, most_chars: int
) -> Iterator[tuple[list[int], list[str]]]:
    """Texts, the long ones in parts, by about `most_chars` at a time: (number of each part's text, parts). Raises TooLong."""
    numbers: list[int] = []
    parts: list[str] = []
    chars = 0
    for number, text in enumerate(texts):
        for part in parts_of(text, cuts, most_chars=most_chars):
            if parts and chars + len(part) > most_chars:
                yield numbers, parts
                numbers, parts, chars = [], [], 0
            numbers.append(number)
            parts.append(part)
            chars += len(part)
    if parts:
        yield numbers, parts
