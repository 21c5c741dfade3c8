#!/usr/bin/env python3
"""Try models on a page of this machine: a tab for each folder, by what it can do.

    python launch/serve.py hf/small hf/sentiment
    python launch/serve.py reviews=hf/sentiment --port 7870
    python launch/serve.py runs/sentiment

Words for [MASK], labels of a text or of two, tags of words, answers in a text, one of several answers, similarity of texts. A run,
a checkpoint or a weights folder is exported to a temporary folder first. Nothing leaves the machine. Ctrl-C ends it.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from encoder.base.command import CommandLine, as_typed, count, run_command
from encoder.base.errors import ConfigError, PassingError
from encoder.base.paths import expand_path

if TYPE_CHECKING:
    from encoder.tools.page.folders import Opened

LAST_PORT = 65_535


def main(argv: list[str] | None = None) -> int:
    """Parses, opens the folders, serves until Ctrl-C, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="an exported folder, a run, a checkpoint or a weights folder; NAME heads its tab",
    )
    parser.add_argument(
        "--port", type=count, metavar="N", help="of the address (default: a free one from 7860 on)"
    )
    parser.add_argument(
        "--similarity",
        action="store_true",
        help="a folder that fills masks gets a second tab, which compares texts",
    )
    args = parser.parse_args(argv)

    def body() -> None:
        named = named_folders(args.folders)
        if args.port:
            check_port(args.port)
        # imported here, so that --help and mistakes need no torch
        from encoder.tools.page.blocks import build_page, launch_page, prepare_gradio

        prepare_gradio()
        with contextlib.ExitStack() as held:
            opened = open_all(named, held, similarity=args.similarity)
            page = build_page(opened)
            address = launch_page(page, port=args.port)
            held.callback(page.close, verbose=False)
            for one in opened:
                print(f"{one.name}: {one.kind}")
            print(f"{address}   (Ctrl-C ends it)", flush=True)
            threading.Event().wait()

    return run_command(body)


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Tabs' names and folders. Raises ConfigError for what is no folder, or for a name that stands twice."""
    found: list[tuple[str, Path]] = []
    for word in words:
        name, _, rest = word.rpartition("=")
        # a folder may have the sign in its own name
        if Path(expand_path(word)).is_dir():
            name = ""
            rest = word
        path = Path(expand_path(rest))
        if not path.is_dir():
            raise ConfigError(
                f"{path} is no folder; needed: one that tessera export wrote, or a run. Look for a"
                " misspelling."
            )
        found.append((name or path.resolve().name, path))
    names = Counter(name for name, _ in found)
    for name, path in found:
        if names[name] > 1:
            raise ConfigError(f"two tabs are called {name}. Name one of them: other={path}")
    return dict(found)


def check_port(port: int) -> None:
    """Raises ConfigError, or PassingError where another program has it."""
    if port > LAST_PORT:
        raise ConfigError(f"--port {port}; needed: at most {LAST_PORT:,}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise PassingError(
                f"port {port} cannot be had ({error.strerror}). Choose another: --port"
                f" {port % LAST_PORT + 1}, or leave it out."
            ) from error


def open_all(
    named: dict[str, Path], held: contextlib.ExitStack, *, similarity: bool
) -> list[Opened]:
    """A model for each tab.

    named: tab -> folder
    held: ends with the page; what was exported for it is removed then
    similarity: folders that fill masks are opened as bodies, too

    Raises UserError.
    """
    from encoder.tools.page.folders import is_hf_folder, open_folder

    found = []
    for name, path in named.items():
        folder = path
        if not is_hf_folder(path):
            print(f"exporting {path} to a temporary folder", flush=True)
            scratch = held.enter_context(tempfile.TemporaryDirectory(prefix="tessera-page-"))
            folder = exported(path, Path(scratch) / "hf")
        opened = open_folder(folder, name=name)
        found.append(opened)
        if similarity and opened.kind == "fill_mask":
            found.append(open_folder(folder, name=f"{name}, similarity", kind="similarity"))
    return found


def exported(source: Path, out: Path) -> Path:
    """A run, a checkpoint or a weights folder as a folder that transformers reads. Raises UserError."""
    from encoder.base.errors import UserError
    from encoder.tools.weights.export import export_run

    try:
        export_run(source, out)
    except UserError as error:
        typed = as_typed("export", source, "OUT")
        raise ConfigError(f"{source} cannot be shown: {error} ({typed} says the same.)") from error
    return out


if __name__ == "__main__":
    sys.exit(main())
