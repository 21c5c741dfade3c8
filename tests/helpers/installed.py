"""Skips what needs a package that is not installed, without importing the package: gradio alone takes 3.6 s of CPU."""

from __future__ import annotations

import importlib.util

import pytest


def needs(*packages: str, extra: str) -> None:
    """For a whole module of tests, when it is imported: it is skipped where one of the packages is not here.

    extra: of pyproject.toml, which brings them
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            why = f"{package} is not installed: pip install -e '.[{extra}]'"
            pytest.skip(why, allow_module_level=True)
