"""Where this node keeps what is made once: tokenised documents, tokenizers, latents."""

import os
import tempfile
from pathlib import Path


def cache_folder(cache_dir: str) -> Path:
    """`cache_dir`; for "" HF_HOME/pretraining_recipes, or a folder for temporary files where that cannot be written."""
    if cache_dir:
        return Path(cache_dir)
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "pretraining_recipes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"pretraining_recipes_{os.getuid()}"
