"""A small real corpus from what every machine has: the Python environment, as `code` and as `prose`.

    code    .py files of the standard library and of the installed packages
    prose   what people wrote about them: docstrings, package descriptions, documentation files

Files are taken in the order of a hash of their name inside the environment, so that the choice is spread over all
packages and is the same for the same environment. A file serves one of the two, never both.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import signal
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_prep.output import output
from encoder.base.errors import ConfigError
from encoder.base.files import refuse_foreign, write_atomic, write_json
from encoder.base.log import say
from encoder.base.main_script import without_main_script
from encoder.base.untrusted import read_json

MANIFEST = "manifest.json"
# at most this share of a source from one package: oci alone has 18,000 files
PACKAGE_SHARE = 0.2
# of the text asked for; with a tenth of it a source has no document to hold out
LEAST_SHARE = 0.5
MIN_CHARS, MAX_CHARS = 200, 200_000
MAX_LINE_CHARS = 500  # longer: data or minified
MIN_LETTERS = 0.5  # share of letters and white space in code; below: tables of numbers
# share of letters, spaces and plain punctuation in prose; below: formulas, paths
MIN_PLAIN = 0.9
NOT_LETTERS = bytes(b for b in range(128) if not (chr(b).isalpha() or chr(b).isspace()))
NOT_PLAIN = bytes(b for b in range(128) if not (chr(b).isalpha() or chr(b) in " ,.'-"))
# the project itself: its text must not change the corpus
OWN = {
    "encoder",
    "data_prep",
    "launch",
    "tessera",
}

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_vendor",
    "vendored",
    "licenses",
    "idle_test",
}
GENERATED = re.compile(
    r"(auto[- ]?|machine[- ]|code[- ]|been )generated|generated (by|from|with|using)|do not edit"
    r"|@generated",
    re.I,
)
LEGAL_FILE = re.compile(
    r"licen[cs]e|copying|notice|author|contributor|changelog|changes|history|third.?party|top_level"
    r"|entry_points|sources|requirements|vendor",
    re.I,
)
LEGAL_TEXT = re.compile(r"copyright|licen[cs]ed? |warrant(y|ies)|all rights reserved", re.I)
QUOTED = re.compile(r'"""(.*?)"""', re.S)
DOCUMENTS = {".md", ".rst", ".txt"}
# indented blocks, lists of arguments, doctests, directives, fields, underlined headings, tables
NOT_PROSE = re.compile(
    r"\A(    |\t|(Args|Arguments|Attributes|Parameters|Kwargs)\s*:)"
    r"|^\s*(>>>|\.\. |:\w|[-=~^*+#]{3,}\s*$|\||\w+ : )",
    re.M,
)
COMMON_WORDS = {
    "the",
    "a",
    "an",
    "of",
    "is",
    "are",
    "to",
    "and",
    "in",
    "for",
    "this",
    "that",
    "with",
    "it",
    "be",
    "or",
    "if",
}


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the environment; `name` is its path below the library folder, without the machine's folders."""

    path: Path
    name: str
    package: str


def environment_corpus(out: Path, *, size_mb: float) -> None:
    """Write out/code.jsonl, out/prose.jsonl (about half of size_mb each) and out/manifest.json. Raises ConfigError."""
    if not 0 < size_mb <= 1000:
        raise ConfigError(f"--size-mb is {size_mb:g}; needed: more than 0 and at most 1000.")
    files = sorted(_files(), key=lambda f: _order(f.name))
    made_from = {"size_mb": size_mb, "corpus": 1, "files": _fingerprint(files)}

    # the manifest is written last, so it tells that all is there
    manifest = out / MANIFEST
    if _stands(manifest, made_from):
        say(f"{out}: made before from the same environment. Nothing to do.")
        return
    refuse_foreign(manifest, ours=lambda head: head.startswith(b'{\n "size_mb": '))
    for name in ("code", "prose"):
        refuse_foreign(
            out / f"{name}.jsonl",
            ours=lambda head: head.startswith(b'{"text": ') and b'"source": "' in head,
        )
    with output(out, ["code.jsonl", "prose.jsonl", MANIFEST]):
        # written last: without it the corpus is not finished
        manifest.unlink(missing_ok=True)
        sums = _write_sources(files, out, int(size_mb * 1e6 / 2))
        write_json(
            manifest,
            {**made_from, "python": ".".join(map(str, sys.version_info[:3])), "sources": sums},
        )


def _write_sources(files: list[File], out: Path, limit: int) -> dict[str, dict[str, Any]]:
    """out/code.jsonl and out/prose.jsonl; returns what the manifest says of them."""
    taken: set[str] = set()
    sources = {"code": _code(files, limit, taken), "prose": _prose(files, limit, taken)}
    sums: dict[str, dict[str, Any]] = {}
    for name, documents in sources.items():
        # in the order of a hash: documents of one package do not lie together
        documents.sort(key=lambda d: _order(d["text"]))
        content = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents).encode(
            "utf-8"
        )
        write_atomic(out / f"{name}.jsonl", content)
        packages = Counter(d["source"].split("/")[0] for d in documents)
        sums[name] = {
            "documents": len(documents),
            "text_bytes": sum(len(d["text"].encode("utf-8")) for d in documents),
            "file_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "packages": len(packages),
        }
        say(
            f"{name}: {sums[name]['text_bytes'] / 1e6:.1f} MB of text, {len(documents):,} documents"
            f" from {len(packages)} packages, {out / f'{name}.jsonl'}"
        )
        if sums[name]["text_bytes"] < LEAST_SHARE * limit:
            raise ConfigError(
                f"this Python environment holds {sums[name]['text_bytes'] / 1e6:.1f} MB of {name};"
                f" needed: {LEAST_SHARE:.0%} of the {limit / 1e6:g} MB asked for. Ask for less with"
                " --size-mb, run it in the environment that the project was installed into (make"
                " install), or bring text of your own."
            )
    return sums


def _code(files: list[File], limit: int, taken: set[str]) -> list[dict[str, str]]:
    documents = _Chosen(limit)
    for file in files:
        if documents.full:
            break
        if (
            file.path.suffix == ".py"
            and documents.room_for(file.package)
            and (text := _python_text(file)) is not None
        ):
            taken.add(file.name)
            documents.add(file, _without_licence(text).strip() + "\n")
    return documents.documents


def _prose(files: list[File], limit: int, taken: set[str]) -> list[dict[str, str]]:
    documents, seen = _Chosen(limit), set()
    # documentation and package descriptions first: the best prose, and the least of it
    left = sorted((f for f in files if f.name not in taken), key=lambda f: f.path.suffix == ".py")
    # spawn, as a forked copy of a process with threads can hang
    with without_main_script():
        pool = get_context("spawn").Pool(
            min(8, os.cpu_count() or 1), initializer=_leave_interrupts_to_the_parent
        )
    with pool:
        for file, paragraphs in zip(left, pool.imap(_prose_of, left, chunksize=50), strict=True):
            if documents.room_for(file.package):
                new = [p for p in dict.fromkeys(paragraphs) if p not in seen]
                seen.update(new)
                documents.add(file, "\n\n".join(new) + "\n")
            if documents.full:
                break
    return documents.documents


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prose_of(file: File) -> list[str]:
    """The paragraphs of one file."""
    if file.path.suffix == ".py":
        text = _python_text(file)
        return _docstring_paragraphs(text) if text and _worth_parsing(text) else []
    text = _read(file.path) or ""
    # METADATA: fields first, the description behind the first empty line
    return list(_paragraphs(text.partition("\n\n")[2] if file.path.name == "METADATA" else text))


class _Chosen:
    """Documents taken so far, each text once, within the limits of the source and of each package."""

    def __init__(self, limit: int) -> None:
        self.documents: list[dict[str, str]] = []
        self._limit = limit
        self._bytes = 0
        self._packages: Counter[str] = Counter()
        self._seen: set[bytes] = set()

    @property
    def full(self) -> bool:
        return self._bytes >= self._limit

    def room_for(self, package: str) -> bool:
        return self._packages[package] < PACKAGE_SHARE * self._limit

    def add(self, file: File, text: str) -> None:
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if len(text) < MIN_CHARS or digest in self._seen:
            return
        self._seen.add(digest)
        size = len(text.encode("utf-8"))
        self._bytes += size
        self._packages[file.package] += size
        self.documents.append({"text": text, "source": file.name})


def _files() -> Iterator[File]:
    """Every .py and documentation file of the standard library and of the packages."""
    paths = sysconfig.get_paths()
    standard = Path(paths["stdlib"])
    for path in _walk(standard):
        if path.suffix == ".py":
            yield File(
                path=path, name=f"python/{path.relative_to(standard).as_posix()}", package="python"
            )
    for folder in dict.fromkeys([Path(paths["purelib"]), Path(paths["platlib"])]):
        for path in _walk(folder):
            parts = path.relative_to(folder).parts
            # numpy-2.1.dist-info -> numpy, six.py -> six
            package = re.split(r"-\d|\.py$", parts[0])[0].lower()
            wanted = (
                path.suffix == ".py"
                or path.name == "METADATA"
                or (path.suffix in DOCUMENTS and not LEGAL_FILE.search(path.stem))
            )
            if wanted and package not in OWN and not parts[0].startswith("__editable__"):
                yield File(path=path, name="/".join(parts), package=package)


def _walk(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        # os.walk goes on into what is left in `folders`
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS]
        yield from (Path(at, name) for name in names)


def _read(path: Path) -> str | None:
    """UTF-8 text of sensible size without the paths of this machine, or None."""
    try:
        if not MIN_CHARS <= path.stat().st_size <= MAX_CHARS:
            return None
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    # a path of this environment would make the text another on each machine
    return None if sys.prefix in text and sys.prefix != sys.base_prefix else text


def _python_text(file: File) -> str | None:
    """A source file that a person wrote, or None."""
    if file.path.name.startswith("_sysconfigdata"):
        # a dump of settings from the build of Python
        return None
    text = _read(file.path)
    if (
        text is None
        or GENERATED.search(text[:2000])
        or max(map(len, text.split("\n"))) > MAX_LINE_CHARS
    ):
        return None
    return text if _share_left(text, NOT_LETTERS) >= MIN_LETTERS else None


def _without_licence(text: str) -> str:
    """The text without a first block of comments about copyright."""
    head = re.match(r"(?:#[^\n]*\n|[ \t]*\n)+", text)
    return text[head.end() :] if head and LEGAL_TEXT.search(head.group()) else text


def _worth_parsing(text: str) -> bool:
    """Whether a good part of a file is docstrings: parsing the others costs most of the time and gives little."""
    return sum(map(len, QUOTED.findall(text))) >= 0.1 * len(text)


def _docstring_paragraphs(text: str) -> list[str]:
    """The prose of all docstrings of a module, in their order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: list[str] = []
    for docstring in _docstrings(tree):
        found += _paragraphs(inspect.cleandoc(docstring))
    return found


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Of a module, class or function and, in their order, of those in its body (ast.walk would visit every name)."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield docstring
    for inner in getattr(node, "body", ()):
        if isinstance(
            inner, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try)
        ):
            yield from _docstrings(inner)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text that read as English, one line each, markup taken off."""
    # blocks of code between ``` or ~~~ go
    fenced = re.sub(r"(?ms)^(```|~~~).*?^\1", "", text)
    for block in re.split(r"\n[ \t]*\n", fenced):
        if NOT_PROSE.search(block):
            continue
        line = " ".join(block.split())
        line = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", line)  # [text](link)
        # :class:`Name`
        line = re.sub(r":[a-z:]+:`[~!]?([^`<]+?)\s*(?:<[^`]*>)?`", r"\1", line)
        # `code` and **bold**
        line = re.sub(
            r"`+([^`]*)`+_{0,2}|\*\*([^*]+)\*\*", lambda m: m.group(1) or m.group(2) or "", line
        )
        if _reads_as_english(line):
            yield line


def _reads_as_english(line: str) -> bool:
    words = line.split()
    if (
        len(words) < 8
        or not line[0].isalpha()
        or "<" in line
        or LEGAL_TEXT.search(line)
        or line[-1] not in ".!?:)"
    ):
        return False
    return (
        _share_left(line, NOT_PLAIN) >= MIN_PLAIN
        and len(COMMON_WORDS.intersection(w.lower() for w in words)) >= 2
    )


def _share_left(text: str, dropped: bytes) -> float:
    """The share of the UTF-8 bytes that stays when the dropped bytes go; letters beyond ASCII stay."""
    data = text.encode("utf-8")
    return len(data.translate(None, dropped)) / max(1, len(data))


def _order(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def _fingerprint(files: list[File]) -> str:
    """Of the names and sizes of all files that could be taken."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _stands(manifest: Path, made_from: dict[str, object]) -> bool:
    try:
        old = read_json(manifest, root=dict, error=ConfigError)
        return all(old[k] == v for k, v in made_from.items()) and all(
            (manifest.parent / f"{name}.jsonl").stat().st_size == s["file_bytes"]
            for name, s in old["sources"].items()
        )
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
