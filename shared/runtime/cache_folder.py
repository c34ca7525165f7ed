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


def keep_datasets_where_it_can_write() -> None:
    """Let `datasets` store what it makes in a folder for temporary files, where its own cannot be written.

    It does not by itself, and would say that the data cannot be read.
    """
    from huggingface_hub.constants import HF_HOME

    if _can_be_written(Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")):
        return
    folder = _temporary() / "datasets"
    os.environ["HF_DATASETS_CACHE"] = str(folder)  # for processes that begin later, and where it is imported later
    if "datasets" in sys.modules:
        import datasets

        datasets.config.HF_DATASETS_CACHE = folder


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"pretraining_recipes_{os.getuid()}"
