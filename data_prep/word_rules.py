"""Where the texts of a tokenizer may be cut into words, so that the ids of the words are those of the text.

    BertPreTokenizer                        at white space, and on both sides of an ASCII mark
    Whitespace, WhitespaceSplit, ...        at white space
    Metaspace on single spaces              at white space between characters that are known to join nothing

A normalizer that puts characters together may look over a mark (= and U+0338), none over a space. SentencePiece's table
works on graphemes, of which one may be a space and what stands beside it. Every other structure is refused.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACES = b" \t\n\r"
SPACE_MARK = "\u2581"  # a space, for SentencePiece
MOST_ADDED_TOKENS = 16  # that are looked for in every text

_MODELS = ("BPE", "WordPiece", "WordLevel", "Unigram")
# they change each character, alone or with the combining ones behind it
_PER_LETTER = ("NFD", "NFKD", "StripAccents", "Lowercase", "BertNormalizer", "Strip")
# they put characters together
_COMPOSING = ("NFC", "NFKC", "Nmt", "Precompiled")
_SPACES_TO_ONE = (r"\s+", " {2,}")
_DROP_SPACES = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
# they change a piece, whatever lies beside it
_OF_A_PIECE = ("Digits", "Punctuation", "ByteLevel", "Split", "Metaspace")
_ONLY_SPLIT_AT_SPACES = (["WhitespaceSplit"], ["WhitespaceSplit", "Metaspace"], ["Metaspace"])

# letters that form a grapheme with what stands before or behind them: AM of Thai and Lao, half-width voiced marks of
# Japanese, a dot of Malayalam, and jamo
_JOINED_LETTERS = frozenset(
    [0x0E33, 0x0EB3, 0xFF9E, 0xFF9F, 0x0D4E]
    + [*range(0x1100, 0x1200), *range(0xA960, 0xA980), *range(0xD7B0, 0xD800)]
)


class UnknownStructure(Exception):
    """A tokenizer of whose texts it is not known where they may be cut; its text says why."""


@dataclass(frozen=True, kw_only=True)
class WordRules:
    """How the texts of a tokenizer fall into words."""

    # between words, and dropped; some of " \t\n\r"
    spaces: bytes
    # each ASCII mark is a word
    marks_alone: bool
    # only between characters that KnownCharacters knows
    between_known: bool
    # large ASCII letters are as small ones, whatever stands beside them
    lowercase: bool
    # what becomes of a word of printable ASCII before the model sees it; None: only the tokenizer knows
    plain: Literal["kept", "lower"] | None
    prefix: str  # of such a word
    # tokens that are found in raw text, over words
    added: tuple[str, ...]


def rules_of(tokenizer: Tokenizer) -> WordRules:
    """How the texts of a tokenizer fall into words. Raises UnknownStructure."""
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    if model["type"] not in _MODELS or model.get("dropout"):
        raise UnknownStructure(f"a model {model['type']} with chance in it or of another kind")
    normalizers = _steps(content["normalizer"], "normalizers")
    for step in normalizers:
        _check_normalizer(step)
    steps = _steps(content["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    drops_spaces = _drops_spaces(steps)
    added = tuple(_added_tokens(content))

    changes = {step["type"] for step in normalizers}
    replaces = any(step["pattern"].get("String") for step in normalizers if "pattern" in step)
    by_letter = not replaces and changes.isdisjoint(_COMPOSING)
    marks_alone = by_letter and kinds[0] == "BertPreTokenizer"
    case = None if replaces else _case_of_ascii(tokenizer)
    one_piece = kinds in _ONLY_SPLIT_AT_SPACES or marks_alone and len(kinds) == 1
    prepends = kinds[-1] == "Metaspace" and steps[-1]["prepend_scheme"] == "always"
    return WordRules(
        spaces=_spaces(tokenizer, drops_spaces=drops_spaces),
        marks_alone=marks_alone,
        between_known=not drops_spaces or "Precompiled" in changes,
        # an added token may be a word in small letters
        lowercase=by_letter and case == "lower" and not added,
        plain=case if one_piece else None,
        prefix=SPACE_MARK if prepends else "",
        added=added,
    )


def _steps(given: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """A step, or those of a sequence, also of one in another."""
    if given is None:
        return []
    if given["type"] != "Sequence":
        return [given]
    return list(chain.from_iterable(_steps(step, inside) for step in given[inside]))


def _check_normalizer(step: dict[str, Any]) -> None:
    kind = step["type"]
    if kind in _PER_LETTER or kind in _COMPOSING:
        return
    # spaces to one, or characters to others where neither are spaces
    if kind == "Replace":
        regex = step["pattern"].get("Regex")
        text = step["pattern"].get("String")
        content = step["content"]
        if regex in _SPACES_TO_ONE and content in (" ", SPACE_MARK):
            return
        if text and content and not _has_space(text + content):
            return
    raise UnknownStructure(f"a normalizer {kind}")


def _has_space(text: str) -> bool:
    return SPACE_MARK in text or any(character.isspace() for character in text)


def _drops_spaces(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether a text's first split drops its white space. Raises UnknownStructure for splits that are not known."""
    kinds = [step["type"] for step in steps]
    drops_spaces = bool(kinds) and kinds[0] in _DROP_SPACES
    for step in steps[int(drops_spaces) :]:
        if step["type"] not in _OF_A_PIECE:
            raise UnknownStructure(f"a pre-tokenizer {step['type']}")
        # `first` asks where in its text a piece lies
        if step["type"] == "Metaspace" and (
            step["prepend_scheme"] == "first"
            or not step["split"]
            or step["replacement"] != SPACE_MARK
        ):
            raise UnknownStructure("a Metaspace that does not treat all words alike")
    if drops_spaces:
        return True
    # without a mark at its beginning the first word differs from the others
    if kinds != ["Metaspace"] or steps[0]["prepend_scheme"] != "always":
        raise UnknownStructure(f"a pre-tokenizer of {' and '.join(kinds) or 'nothing'}")
    return False


def _added_tokens(content: dict[str, Any]) -> Iterator[str]:
    """Tokens that are found in text; the encoder takes the names of special ones for text."""
    tokens = [token for token in content["added_tokens"] if not token["special"]]
    if len(tokens) > MOST_ADDED_TOKENS:
        raise UnknownStructure(f"{len(tokens)} added tokens that are not special")
    for token in tokens:
        if token["normalized"] and content["normalizer"] is not None:
            raise UnknownStructure("added tokens that are found in normalized text")
        yield token["content"]


def _case_of_ascii(tokenizer: Tokenizer) -> Literal["kept", "lower"] | None:
    """What becomes of printable ASCII."""
    characters = [chr(code) for code in range(33, 127)]
    normal = [_normal(tokenizer, character) for character in characters]
    if normal == characters:
        return "kept"
    if normal == [character.lower() for character in characters]:
        return "lower"
    return None


def _normal(tokenizer: Tokenizer, text: str) -> str:
    if tokenizer.normalizer is None:
        return text
    return tokenizer.normalizer.normalize_str(text)


def _spaces(tokenizer: Tokenizer, *, drops_spaces: bool) -> bytes:
    """Those of SPACES whose every run is white space when it is normalized, or a single space. Raises UnknownStructure."""
    # a mark is no white space to a split that drops spaces
    single = ("a b",) if drops_spaces else ("a b", f"a{SPACE_MARK}b")
    for spaces in (SPACES, b" "):
        found = [_normal(tokenizer, f"a{run}b") for run in _runs(spaces.decode())]
        if drops_spaces and all(text[1:-1].isspace() for text in found):
            return spaces
        if all(text in single for text in found):
            return spaces
    raise UnknownStructure("a normalizer that keeps runs of spaces")


def _runs(spaces: str) -> Iterator[str]:
    """All runs of one to three; longer ones behave as these."""
    for first in spaces:
        yield first
        for second in spaces:
            yield first + second
            yield from (first + second + third for third in spaces)


class KnownCharacters:
    """Tells which characters stay what they are beside a space: asked of the tokenizer once for each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # of each code point below 2^16: whether it was asked for, and what was found
        self._asked = np.zeros(2**16, bool)
        self._known = np.zeros(2**16, bool)

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """Of each code point below 2^16, bool."""
        for code in np.unique(codes[~self._asked[codes]]).tolist():
            self._asked[code] = True
            self._known[code] = self._stays(code)
        return self._known[codes]

    def _stays(self, code: int) -> bool:
        """Whether a character is a letter, number, mark or sign by itself, before and behind normalizing."""
        if code in _JOINED_LETTERS or unicodedata.category(chr(code))[0] not in "LNPS":
            return False
        normal = _normal(self._tokenizer, chr(code))
        if not normal or _has_space(normal):
            return False
        return unicodedata.category(normal[0])[0] in "LNPS"
