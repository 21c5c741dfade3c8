"""The door to other machines: one file, from a URL to a path; the only importer of streaming in this room.

Folders of this machine and https need nothing; object storage needs mosaicml-streaming, the extra `remote`.
"""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path

from encoder.base.errors import ShardError

TIMEOUT_SECONDS = 60.0  # without a byte

# what streaming's downloaders serve; https and file are read here
SCHEMES = (
    "s3",
    "gs",
    "hf",
    "https",
    "http",
    "azure",
    "azure-dl",
    "oci",
    "sftp",
    "dbfs",
    "alipan",
    "file",
)


def url_of(folder: str, name: str) -> str:
    """A file of a folder that a URL or a path names."""
    return f"{folder.rstrip('/')}/{name}"


def download(url: str, path: Path) -> None:
    """Copy a file to `path`, whose folder is there and the caller's own.

    Raises ShardError where streaming is needed and not here, else whatever the many back ends raise.
    """
    scheme = url.partition("://")[0] if "://" in url else "file"
    if scheme == "file":
        shutil.copyfile(url.removeprefix("file://"), path)
        return
    if scheme in ("https", "http"):
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response,
            open(path, "wb") as f,
        ):
            shutil.copyfileobj(response, f, 1 << 20)
        return
    try:
        # 3.8 s to import, so only where it is needed
        from streaming.base.storage.download import CloudDownloader
    except ModuleNotFoundError as error:
        raise ShardError(
            f"{url} is read by mosaicml-streaming, which is not here ({error.name}). Install the"
            " extra: pip install 'tessera-encoders[remote]'; or copy the shards to a disk of this"
            " machine."
        ) from error

    CloudDownloader.direct_download(url, str(path), TIMEOUT_SECONDS)
