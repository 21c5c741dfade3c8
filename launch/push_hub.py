#!/usr/bin/env python3
"""Upload an export to the Hugging Face hub: a folder that launch/export_hf.py wrote, whole and as it was proven.

    python launch/push_hub.py HF_FOLDER ORG/NAME [--private] [--revision BRANCH]

Needs a token with write access: from hf auth login, or in the environment as HF_TOKEN. It is never printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from encoder.base.command import CommandLine, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, uploads, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="HF_FOLDER", help="a folder written by tessera export"
    )
    parser.add_argument(
        "repository", metavar="ORG/NAME", help="where to; made if it is not there yet"
    )
    parser.add_argument(
        "--private", action="store_true", help="a new repository is seen by its owners alone"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="a branch of it (default: main)")
    args = parser.parse_args(argv)

    def body() -> None:
        from encoder.models.hf.push import push_export

        lines = push_export(
            args.folder, args.repository, private=args.private, revision=args.revision
        )
        print("\n".join(lines))

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
