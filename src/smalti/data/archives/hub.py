"""Data sets of Hugging Face by name, through their own library: the only code here that uses the network by itself."""

import re
from pathlib import Path

from smalti.errors import DataError, MissingExtraError
from smalti.reading import reading


def download(name: str) -> Path:
    """Folder of a data set in the cache of the library ``datasets``, downloaded if it isn't there.

    Args:
        name: ``OWNER/NAME``, or ``OWNER/NAME/CONFIGURATION``.

    Raises:
        DataError: if there is no such data set, or it can't be downloaded.
        MissingExtraError: without ``datasets``.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"{name}: no such folder; hf=PATH needs a folder, or OWNER/NAME of a data set")
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            f'hf={name}: there is no such folder, and to download a data set needs datasets: pip install "smalti[hf]"'
        ) from None
    owner, title, *configuration = name.split("/")
    with reading(f"hf={name}", "a data set"):
        found = datasets.load_dataset(f"{owner}/{title}", *configuration)
        files = [Path(one["filename"]) for split in found.values() for one in split.cache_files]
    if not files:
        raise DataError(f"hf={name}: the library keeps no file of it")
    return files[0].parent
