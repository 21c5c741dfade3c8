#!/usr/bin/env python3
"""How fast it is here, beside what others do: preparation, loader, step, attention, optimizer, engine, checkpoint.

python launch/bench.py [prep|loader|step|attention|optimizer|engine|checkpoint|gemm|loss|time-to-loss|all]
                       [--device cpu|cuda] [--against hf] [--json FILE] [...]
each question has more: launch/bench.py step --help
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from encoder.base.home import home


def main(argv: Sequence[str] | None = None) -> int:
    """Asks, prints, returns the exit code."""
    # as launch/pretrain.py has it; peers in this process have it, too
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    root = str(home())
    # benchmarks/ is no package of its own where a wheel is installed
    if root not in sys.path:
        sys.path.insert(0, root)
    from encoder.base.command import run_command

    def body() -> None:
        # here: torch takes seconds, in which Ctrl-C may come
        from benchmarks.command import bench

        bench(sys.argv[1:] if argv is None else argv)

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
