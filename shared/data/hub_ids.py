"""Whether what `--data` names can be a data set on the Hub."""

import re

# Endings of the files that recipes read, which no Hub id has.
_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet", ".gz", ".xz", ".zst", ".tar", ".jpg", ".jpeg", ".png", ".webp")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id (`name` or `owner/name`) and not that of a path to a file."""
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)
    return bool(is_id) and not name.lower().endswith(_FILE_SUFFIXES)
