#!/usr/bin/env python3
"""Train vectors for search from a pretrained model: sentence-transformers' trainer, our data, settings and evaluation.

    python launch/embed.py EMBED.yaml [key=value ...]
    python launch/embed.py EMBED.yaml --evaluate-only          start_from as it is
    python launch/embed.py EMBED.yaml --json result.json       the numbers, also to a file

Exit code: 0 done, 2 a mistake in the input, 130 stopped by Ctrl-C; the folder is written at the end, whole or not at all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from encoder.base.command import CommandLine, run_command
from encoder.base.errors import ConfigError
from encoder.base.files import refuse_foreign, write_json


def main(argv: list[str] | None = None) -> int:
    """Parses, trains, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "settings",
        metavar="EMBED.yaml",
        help="the settings file, for example configs/embed/boolq.yaml",
    )
    parser.add_argument(
        "--evaluate-only", action="store_true", help="no training: the numbers of start_from"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.takes_overrides(example="seed=3 lr.peak=3e-5")
    args = parser.parse_args(argv)

    def body() -> None:
        if args.json:
            refuse_foreign(args.json, ours=lambda head: head.startswith(b"{") and b'"name"' in head)
        from encoder.tools.embedding.config import read_embed

        settings = read_embed(args.settings, args.overrides)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "embedding training runs on one rank: over several, a question would choose among"
                " the answers of its own rank. Start it without a launcher."
            )
        # local files alone, also where their library would look for news of a model
        os.environ["HF_HUB_OFFLINE"] = "1"
        from encoder.tools.embedding.train import evaluate_embedding, train_embedding

        run = evaluate_embedding if args.evaluate_only else train_embedding
        found = run(settings, say=lambda line: print(line, flush=True))
        if args.json:
            write_json(args.json, found)

    return run_command(body, stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
