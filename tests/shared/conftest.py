"""What the tests of the text helpers share."""

from pathlib import Path
from typing import Any

import pytest

from shared.text.documents import open_texts
from shared.text.tokenization import load_tokenizer, train_byte_level_bpe


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """The 25 eval documents of the embedded prose, 0.9 MB."""
    return list(open_texts("prose_eval", config="", split="", text_column="text"))


@pytest.fixture(scope="session")
def tokenizer(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE of 1,024 tokens, trained on `prose` and loaded from its folder."""
    return load_tokenizer(save_tokenizer(train_byte_level_bpe(prose, 1024, 256), tmp_path_factory.mktemp("tokenizer")))


def save_tokenizer(tokenizer: Any, folder: Path) -> str:
    """Save and return the folder."""
    tokenizer.save_pretrained(folder)
    return str(folder)
