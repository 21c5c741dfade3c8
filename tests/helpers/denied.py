"""A file that may not be read, also where tests run as root, who may read all."""

from __future__ import annotations

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest


def denied(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """From now on opening the file fails as it does for a user without rights, and os.access says no."""

    def refusing(real: Any) -> Any:
        def asked(name: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(name, (str, os.PathLike)) and Path(name) == path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(name, *args, **kwargs)

        return asked

    may = os.access

    def access(name: Any, mode: int, **kwargs: Any) -> bool:
        return Path(os.fsdecode(name)) != path and may(name, mode, **kwargs)

    monkeypatch.setattr(builtins, "open", refusing(open))
    monkeypatch.setattr(io, "open", refusing(io.open))
    monkeypatch.setattr(os, "open", refusing(os.open))
    monkeypatch.setattr(os, "access", access)
