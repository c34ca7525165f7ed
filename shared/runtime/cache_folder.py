"""Where this node keeps what is made once: tokenised texts, latents, tables."""

import os
import sys
import tempfile
from pathlib import Path


def cache_folder(cache_dir: str) -> Path:
    """`cache_dir`; for "" HF_HOME/pretraining_recipes, or a folder for temporary files where that cannot be written."""
    if cache_dir:
        return Path(cache_dir)
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "pretraining_recipes"
    return folder if _can_be_written(folder) else _temporary()


def keep_caches_where_they_can_be_written() -> None:
    """Let `datasets` and `evaluate` store what they make among temporary files, where their own folders are read-only.

    They do not by themselves, and what they raise would say that the data cannot be read.
    """
    from huggingface_hub.constants import HF_HOME

    for library, name, usual in (
        ("datasets", "HF_DATASETS_CACHE", "datasets"),
        ("evaluate", "HF_METRICS_CACHE", "metrics"),
    ):
        if _can_be_written(Path(os.environ.get(name) or Path(HF_HOME) / usual)):
            continue
        folder = _temporary() / usual
        os.environ[name] = str(folder)  # for processes that begin later, and where it is imported later
        if library in sys.modules:
            setattr(sys.modules[library].config, name, folder)


def _can_be_written(folder: Path) -> bool:
    """Whether it can be made, or is there and can be written; nothing is made."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"pretraining_recipes_{os.getuid()}"
