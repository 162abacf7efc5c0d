"""Tables: a csv, tsv, json, jsonl or parquet file as a data set, read by pandas and Arrow."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from pipelines.core.config import DataConfig
from pipelines.core.disk import no_room
from pipelines.core.errors import InputError

# The builder of `datasets` and its arguments for each kind of file. Only an empty cell of a table is a missing value:
# pandas would read the words "NA", "None" and "null" as missing too, which are texts and class names like any other.
_TABLE = {"keep_default_na": False, "na_values": [""]}
# Named "utf-8", the json builder passes bytes on undecoded, and bad ones surface only when a text is read.
_JSON = {"encoding": "utf-8-sig"}
FILE_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _TABLE),
    ".tsv": ("csv", {"sep": "\t", **_TABLE}),
    ".json": ("json", _JSON),
    ".jsonl": ("json", _JSON),
    ".parquet": ("parquet", {}),
}


def read_table(path: Path, config: DataConfig) -> datasets.Dataset:
    """A csv, tsv, json, jsonl or parquet file as it is."""
    builder, arguments = FILE_BUILDERS[path.suffix.lower()]
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it is about to raise
    try:
        # Data files are patterns: unescaped, the brackets of "texts [1].csv" would match another file or none.
        table = datasets.load_dataset(builder, data_files=glob.escape(str(path)), split="train", **arguments)
        if builder == "parquet":
            table.data.validate(full=True)  # nobody has looked at the bytes of its texts yet
        return table
    except Exception as error:  # parsers raise errors of their own kinds, and `datasets` wraps some of them
        if full := no_room(error):
            raise InputError(
                f"expected room on the disk for a copy of {path} in {datasets.config.HF_DATASETS_CACHE}, found none ({full}); make room, or "
                "set HF_DATASETS_CACHE to a folder on another disk"
            ) from error
        raise InputError(
            f"expected a well-formed {path.suffix.lower()[1:]} file in UTF-8, found that {path} cannot be read "
            f"({reason(error)}); repair the file or save it again"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def reason(error: BaseException) -> str:
    """What went wrong while `datasets` read a file, out of its "an error occurred"."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
