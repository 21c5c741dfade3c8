"""New processes of ours do not run the script that started them: it need not hide its work behind `if __name__ == ...`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def without_main_script() -> Iterator[None]:
    """Within, a process that multiprocessing starts (spawn, forkserver) does not import this one's main module again.

    It would train, or prepare, once more in each worker. Only for processes whose work lies in modules of ours: what
    is defined in the main module cannot be sent to them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
