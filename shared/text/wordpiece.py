"""WordPiece with the special tokens of Devlin et al. 2019: train one, or load one."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError
from shared.runtime.atomic_folder import written_aside
from shared.text import tokenization
from shared.text.documents import Beginning, Texts
from shared.text.vocabulary import num_ids

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"  # begins a token that continues a word


def train_wordpiece(documents: Iterable[str], vocab_size: int, seq_length: int, lowercase: bool) -> Any:
    """Train a WordPiece vocabulary (Schuster and Nakajima 2012; merges as in BPE, which `tokenizers` counts on).

    Args:
        documents: the text to count on.
        vocab_size: entries in all; fewer come out where the corpus has too few merges.
        seq_length: longest row of the model, noted as `model_max_length`.
        lowercase: whether text loses case and accents, as in BERT's uncased models.

    Returns:
        A `transformers.BertTokenizer`.

    Raises:
        UsageError: the characters of the text alone need a larger vocabulary.
    """
    from tokenizers import trainers
    from transformers import BertTokenizer

    backend = BertTokenizer(do_lower_case=lowercase).backend_tokenizer
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    backend.train_from_iterator((tokenization.to_bytes(text).decode("utf-8", "replace") for text in documents), trainer)
    vocabulary = backend.get_vocab()
    if len(vocabulary) > vocab_size:
        raise UsageError(f"vocab_size: {vocab_size}: expected at least {len(vocabulary)}, the characters of the text")
    return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, model_max_length=seq_length)


def load_or_train(
    name: str, source: Texts, *, vocab_size: int, seq_length: int, lowercase: bool, cache_dir: Path
) -> Any:
    """Load the tokenizer `name`, or for "" one that is trained on the beginning of `source` and kept in the cache.

    Args:
        name: a folder or Hub id; see `load_wordpiece`.
        source: a corpus; `tokenization.TRAINING_CHARACTERS` of it are read.
        vocab_size: see `train_wordpiece`.
        seq_length: see `train_wordpiece`.
        lowercase: see `train_wordpiece`.
        cache_dir: this node's cache folder.
    """
    from tqdm import tqdm

    if name:
        return load_wordpiece(name)
    key = repr(("wordpiece", source.fingerprint, vocab_size, seq_length, lowercase))
    folder = cache_dir / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not folder.exists():
        beginning = Beginning(source, tokenization.TRAINING_CHARACTERS)
        documents = tqdm(beginning, desc="training a tokenizer", unit="doc", delay=2)
        tokenizer = train_wordpiece(documents, vocab_size, seq_length, lowercase)
        with written_aside(folder) as aside:
            tokenizer.save_pretrained(aside)
    return load_wordpiece(str(folder))


def load_wordpiece(name: str) -> Any:
    """Load a tokenizer from a folder or the Hub; no code that comes with it is run.

    Raises:
        UsageError: it is not there, has no fast version, or lacks a token that BERT's rows need.
    """
    tokenizer = tokenization.load_fast(name)
    for token in ("cls_token", "sep_token", "mask_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise UsageError(f"tokenizer: {name!r}: expected one with a {token}")
    return tokenizer


def continues_word(tokenizer: Any) -> np.ndarray:
    """For each id whether its token continues the word before it, bool (ids,); what is masked whole is a word."""
    continues = np.zeros(num_ids(tokenizer), dtype=bool)
    continues[[number for token, number in tokenizer.get_vocab().items() if token.startswith(CONTINUATION)]] = True
    return continues


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of a tokenizer."""

    mask_token_id: int
    is_special: np.ndarray  # bool (V,)
    continues_word: np.ndarray  # bool (V,): whether a token continues the word before it
    ordinary_ids: np.ndarray  # int64, of all tokens that are not special


def look_up_vocabulary(tokenizer: Any) -> Vocabulary:
    """The special tokens, and those that continue a word."""
    ids = np.array(sorted(tokenizer.get_vocab().values()))
    is_special = np.isin(np.arange(num_ids(tokenizer)), tokenizer.all_special_ids)
    ordinary_ids = ids[~is_special[ids]]
    return Vocabulary(tokenizer.mask_token_id, is_special, continues_word(tokenizer), ordinary_ids)
