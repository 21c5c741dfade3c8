"""The door to other machines: one file, from a URL to a path; the only importer of streaming in this room."""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 60.0      # without a byte

# what streaming's downloaders serve; https is read here
SCHEMES = ("s3", "gs", "hf", "https", "http", "azure", "azure-dl", "oci", "sftp", "dbfs", "alipan", "file")


def url_of(folder: str, name: str) -> str:
    """A file of a folder that a URL or a path names."""
    return f"{folder.rstrip('/')}/{name}"


def download(url: str, path: Path) -> None:
    """Copy a file to `path`, whose folder is there and the caller's own. Raises whatever the many back ends raise."""
    if urlsplit(url).scheme in ("https", "http"):
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, open(path, "wb") as f:
            shutil.copyfileobj(response, f, 1 << 20)
        return
    from streaming.base.storage.download import CloudDownloader  # 3.8 s to import, so only where it is needed

    CloudDownloader.direct_download(url.removeprefix("file://"), str(path), TIMEOUT_SECONDS)
