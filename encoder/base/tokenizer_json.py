"""A tokenizer.json: its tokens and their ids, which token has which role, and how they frame a text.

    role    a token of one of these names, marked special
    cls     [CLS]  <cls>  <s>
    sep     [SEP]  <sep>  </s>
    pad     [PAD]  <pad>              mask    [MASK]  <mask>              unk     [UNK]  <unk>

A token of another name says so itself, in its entry of added_tokens: {"content": "[BEGIN]", "role": "cls", ...}. Libraries
pass over that key; data-prep tokenizer from-hf puts it there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from encoder.base.errors import ShardError, UserError
from encoder.base.untrusted import missing, read_json

Frame = Literal["both_ends", "end"]

ROLES = {
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}
MOST_TOKEN_ID = 2**24  # of a tokenizer.json: libraries make tables up to its largest id


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The tokens that structure a document; `all_special` are never masked nor drawn as replacements."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    unk_id: int
    all_special: tuple[int, ...]
    # both_ends: [CLS] text [SEP]; end: text [SEP] [CLS], as XLNet has it
    frame: Frame = "both_ends"

    @property
    def before(self) -> tuple[int, ...]:
        """The ids before a text."""
        if self.frame == "both_ends":
            return (self.cls_id,)
        return ()

    @property
    def behind(self) -> tuple[int, ...]:
        """The ids behind a text."""
        if self.frame == "both_ends":
            return (self.sep_id,)
        return (self.sep_id, self.cls_id)


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """The content of a tokenizer.json, checked to be one."""

    path: Path
    content: dict[str, Any]
    ids: dict[str, int]  # by token, added ones included
    added: list[dict[str, Any]]  # as they stand

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values()) + 1

    @property
    def special(self) -> set[str]:
        """Tokens that no text gives: encoders take their spelling in a text for text."""
        return {token["content"] for token in self.added if token.get("special") is True}

    def roles(self) -> dict[str, str]:
        """Role -> token, as far as there are tokens of known names, or such as say their role."""
        # a token that says its role goes first, then one of a known name
        # that is special, then any such
        told = {role: token["content"] for token in self.added if (role := _role_of(token))}
        found = {}
        for role, names in ROLES.items():
            here = [name for name in names if name in self.ids]
            marked = [name for name in here if name in self.special]
            if name := told.get(role) or next(iter(marked or here), None):
                found[role] = name
        return found


def read_tokenizer_json(path: Path, *, error: type[UserError] = ShardError) -> TokenizerFile:
    """Reads a tokenizer.json. Raises `error` for what is none."""
    try:
        content = read_json(path, root=dict, error=error)
    except error as why:
        if missing(why):
            raise
        reason = str(why).removeprefix(f"{path} ").rstrip(".")
        raise error(
            f"{path} is no tokenizer.json ({reason}). Make one with data-prep tokenizer."
        ) from why
    try:
        added = content.get("added_tokens", [])
        # added tokens come last: they may have ids of the vocabulary, or their own behind it
        ids = {**_vocabulary(content["model"]), **{a["content"]: a["id"] for a in added}}
        _check_ids(ids)
        if not all(isinstance(a["content"], str) for a in added):
            raise ValueError("an added token is no text")
        if not ids:
            raise ValueError("it has no tokens")
    except (ValueError, KeyError, TypeError, AttributeError) as why:
        raise error(
            f"{path} is no tokenizer.json ({why}). Make one with data-prep tokenizer."
        ) from why
    return TokenizerFile(path=path, content=content, ids=ids, added=added)


def special_ids_of(path: Path, *, error: type[UserError] = ShardError) -> tuple[int, SpecialIds]:
    """(vocabulary size, special ids) of a tokenizer.json. Raises `error` where a role has no token, and where its token is
    not marked special: encoders would give its id to its spelling in raw text.
    """
    file = read_tokenizer_json(path, error=error)
    roles = file.roles()
    check_roles(file, roles, error=error)
    return file.vocab_size, SpecialIds(
        **{f"{role}_id": file.ids[name] for role, name in roles.items()},
        all_special=tuple(sorted({file.ids[name] for name in file.special})),
        frame=frame_of(file.content, roles),
    )


def check_roles(file: TokenizerFile, roles: Mapping[str, str], *, error: type[UserError]) -> None:
    """Every role has a token of its own that is marked special. Raises `error`."""
    if lacking := [names[0] for role, names in ROLES.items() if role not in roles]:
        raise error(
            f"{file.path} lacks {', '.join(lacking)}, or names it otherwise; needed: [CLS] [SEP]"
            " [PAD] [MASK] [UNK], or <s> </s> <pad> <mask> <unk>, or <cls> <sep>. Tell other names"
            " to data-prep tokenizer from-hf (its --cls and others), or make a tokenizer with"
            " data-prep tokenizer."
        )
    if unknown := [name for name in roles.values() if name not in file.ids]:
        raise error(
            f"{file.path} has no token {unknown[0]}. Name a token of its vocabulary or of its"
            " added_tokens."
        )
    twice = [name for name in roles.values() if [*roles.values()].count(name) > 1]
    if twice:
        where = " and ".join(role for role, name in roles.items() if name == twice[0])
        raise error(
            f"{file.path}: {twice[0]} is the token of {where}; needed: a token for each of"
            f" {', '.join(ROLES)}."
        )
    if plain := [name for name in roles.values() if name not in file.special]:
        raise error(
            f"{file.path} does not mark {', '.join(plain)} as special, so that a text could"
            ' write their ids; needed: "special": true in its added_tokens. Change it there: the'
            " ids stay the same."
        )


def frame_of(content: Mapping[str, Any], roles: Mapping[str, str]) -> Frame:
    """Where the post-processor of a tokenizer.json puts [CLS]; both ends where it has none that says it."""
    # one post-processor, or several in a row, of which a template is one
    found = content.get("post_processor") or {}
    steps = found.get("processors", [found]) if isinstance(found, dict) else []
    for step in steps:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            names = [next(iter(part.values()))["id"] for part in step["single"]]
            if names == ["A", roles.get("sep"), roles.get("cls")]:
                return "end"
    return "both_ends"


def template(
    roles: Mapping[str, str], ids: Mapping[str, int], *, frame: Frame, second: int = 1
) -> dict[str, Any]:
    """The post-processor that frames a text and a pair of texts.

    [CLS] A [SEP]      [CLS] A [SEP] B [SEP]              segments 0 and `second`
    <s> A </s>         <s> A </s></s> B </s>              RoBERTa's: all of segment 0
    A <sep> <cls>      A <sep> B <sep> <cls>              XLNet's: segments 0 and `second`, <cls> of 2

    roles: role -> token
    ids: token -> id
    frame: where [CLS] stands
    second: the segment of the second text
    """
    cls, sep = roles["cls"], roles["sep"]

    single = f"{cls}:0 A:0 {sep}:0"
    pair = f"{single} B:{second} {sep}:{second}"
    if frame == "end":
        single = f"A:0 {sep}:0 {cls}:2"
        pair = f"A:0 {sep}:0 B:{second} {sep}:{second} {cls}:2"
    elif cls == "<s>":
        pair = f"{single} {sep}:0 B:0 {sep}:0"
    return {
        "type": "TemplateProcessing",
        "single": [_part(word) for word in single.split(" ")],
        "pair": [_part(word) for word in pair.split(" ")],
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (cls, sep)
        },
    }


# ids kept free for later or left over: [unused12] (BERT, ModernBERT), <unused12> (Gemma),
# madeupword0001 (RoBERTa), <|reserved_special_token_12|> (Llama 3), <extra_id_12> (T5)
_UNUSED = re.compile(
    r"[\[<]\|?(unused|reserved)[a-z_ ]*[-_ ]?\d+\|?[\]>]|<extra_id_\d+>|madeupword\d+",
    re.IGNORECASE,
)


def is_unused(token: str) -> bool:
    """Whether a token is one that is kept free for later, such as [unused12]."""
    return _UNUSED.fullmatch(token) is not None


def unused_ids(path: Path, *, vocab_size: int) -> tuple[int, ...]:
    """The ids below `vocab_size` that no text gives: of tokens such as [unused12], and of no token. Raises ShardError."""
    ids = read_tokenizer_json(path).ids
    used = {number for token, number in ids.items() if not is_unused(token)}
    return tuple(number for number in range(vocab_size) if number not in used)


def _role_of(token: Mapping[str, Any]) -> str | None:
    role = token.get("role")
    if isinstance(role, str) and role in ROLES:
        return role
    return None


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id: a mapping, or of a Unigram model a list of [token, score]."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {token: number for number, (token, _) in enumerate(vocab)}
    return dict(vocab)


def _check_ids(ids: Mapping[str, Any]) -> None:
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < MOST_TOKEN_ID:
            raise ValueError(
                f"{token[:60]!r} has the id {ascii(number)[:60]}; needed: a whole number below 2^24"
            )


def _part(word: str) -> dict[str, Any]:
    name, _, segment = word.rpartition(":")
    kind = "SpecialToken"
    if name in ("A", "B"):
        kind = "Sequence"
    return {kind: {"id": name, "type_id": int(segment)}}
