"""Shards whose tokenizer was edited after the model was trained: what may differ, and where the new tokens' rows come from.

init_from's tokenizer      ... 12 [unused0]   13 [unused1]   14 cat
the shards' tokenizer      ... 12 covid       13 [unused1]   14 cat   15 ICU        renamed: {"[unused0]": covid}, added: mean
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from encoder.base.errors import ConfigError, ModelError
from encoder.base.files import native_path
from encoder.base.tokenizer_json import is_unused, read_tokenizer_json
from encoder.base.untrusted import native_code

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """How the shards' tokenizer was edited, against that of init_from; what is not said is refused."""

    # unused tokens of init_from -> the tokens of the same ids in the shards; they keep their rows
    renamed: dict[str, str] = field(default_factory=dict)
    # tokens that init_from has not: drawn, rows as a new model has them; mean, of the rows of their pieces in init_from
    added: Literal["refused", "drawn", "mean"] = "refused"

    def __post_init__(self) -> None:
        if not self.renamed and self.added == "refused":
            raise ConfigError(
                "vocabulary says nothing: needed is renamed: {OLD: NEW}, or added: drawn or mean."
                " Leave it out where the shards have the tokenizer of init_from."
            )
        if plain := [token for token in self.renamed if not is_unused(token)]:
            raise ConfigError(
                f"vocabulary.renamed: {plain[0]!r} is no unused token, such as [unused1]: its row"
                " means that token. Rename unused ones alone."
            )


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What the shards' tokenizer has otherwise, checked to be what the run says."""

    renamed: Mapping[int, str]  # id -> its token now
    added: Mapping[int, str]
    # added id -> the ids by which the model's tokenizer writes its text, where it can and the run asks for their mean
    means: Mapping[int, Sequence[int]]

    @property
    def drawn(self) -> tuple[int, ...]:
        """The added ids whose rows are those of a new model."""
        return tuple(number for number in self.added if number not in self.means)

    @property
    def text(self) -> str:
        """One line for the run's header."""
        parts = []
        if self.renamed:
            parts.append(f"tokens renamed: {len(self.renamed):,}, with the rows that they had")
        if self.added:
            parts.append(
                f"tokens added: {len(self.added):,}, rows of {len(self.means):,} the mean of their"
                f" pieces, of {len(self.drawn):,} drawn"
            )
        return "; ".join(parts) or "no token is renamed or added: vocabulary has no effect"


def edits_of(source: Path, shards: Path, config: VocabularyConfig | None) -> Edits:
    """Every id is the same token in both tokenizer.json, or another one that the run names; how text is cut may differ.

    source: the model's
    shards: the shards'
    config: what may differ; None: nothing

    Raises ModelError for any other difference, and for a renaming that is none.
    """
    # id -> token in both
    there = _tokens_of(source)
    here = _tokens_of(shards)
    renames: Mapping[str, str] = {}
    if config:
        renames = config.renamed
    renamed: dict[int, str] = {}
    added: dict[int, str] = {}
    # three kinds of differences: renamed, added, and those that are refused
    for number in sorted(there.keys() | here.keys()):
        old, new = there.get(number), here.get(number)
        if old == new:
            continue
        if old is not None and new is not None and renames.get(old) == new:
            renamed[number] = new
        elif old is None and new is not None and config and config.added != "refused":
            added[number] = new
        else:
            raise ModelError(_difference(number, old, new, source, shards))

    missing = {old: new for old, new in renames.items() if new not in renamed.values()}
    if missing:
        old, new = next(iter(missing.items()))
        raise ModelError(
            f"vocabulary.renamed says {old!r}: {new!r}, but no id is the one in {source} and the"
            f" other in {shards}. Leave it out, or prepare the shards with the edited tokenizer."
        )
    means = {}
    if config and config.added == "mean":
        means = _pieces_there(source, shards, added)
    return Edits(renamed=renamed, added=added, means=means)


def _pieces_there(
    source: Path, shards: Path, added: Mapping[int, str]
) -> dict[int, tuple[int, ...]]:
    """The ids by which the model's tokenizer writes each added token's text; without tokens that are unknown to it.

    source: the model's tokenizer.json
    shards: the shards', which tells the text of a token
    added: id -> token
    """
    old, new = _opened(source), _opened(shards)
    file = read_tokenizer_json(source, error=ModelError)
    # a piece ##like this is written as the word it is
    prefix = file.content["model"].get("continuing_subword_prefix") or ""
    never = {file.ids[name] for name in file.special}
    found = {}
    for number, token in added.items():
        text = new.decode([number], skip_special_tokens=False) or token
        ids = old.encode(text.removeprefix(prefix), add_special_tokens=False).ids
        if ids and not never & {*ids}:
            found[number] = tuple(ids)
    return found


def _difference(number: int, old: str | None, new: str | None, source: Path, shards: Path) -> str:
    said = ["no token" if token is None else repr(token) for token in (old, new)]
    meant = ""
    if old is None:
        meant = " Where it was added: vocabulary: {added: mean}, or drawn."
    elif new is not None and is_unused(old):
        meant = f" Where it was renamed: vocabulary: {{renamed: {{{old!r}: {new!r}}}}}."
    return (
        f"id {number} is {said[0]} in {source}, {said[1]} in {shards}; needed: shards made"
        f" with that model's tokenizer. Prepare them with it, or start from another model.{meant}"
    )


def _opened(tokenizer_json: Path) -> Tokenizer:
    import tokenizers

    what = f"{tokenizer_json} cannot be used as a tokenizer.json"
    with native_path(tokenizer_json) as path, native_code(what, error=ModelError):
        return tokenizers.Tokenizer.from_file(path)


def _tokens_of(tokenizer_json: Path) -> dict[int, str]:
    """The token of each id."""
    ids = read_tokenizer_json(tokenizer_json, error=ModelError).ids
    return {number: token for token, number in ids.items()}
