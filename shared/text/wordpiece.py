"""WordPiece with the special tokens of Devlin et al. 2019: train one, or load one."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError, expect
from shared.runtime.atomic_folder import one_builder, written_aside
from shared.text import tokenization
from shared.text.documents import Beginning, Texts
from shared.text.vocabulary import num_ids

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"  # begins a token that continues a word
WORD_STARTS = ("\u0120", "\u010a", "\u2581")  # a blank and a line end in byte-level BPE, a blank in SentencePiece


def train_wordpiece(
    documents: Iterable[str],
    vocab_size: int,
    seq_length: int,
    lowercase: bool,
    limit_alphabet: int = 1000,
    min_frequency: int = 2,
) -> Any:
    """Train a WordPiece vocabulary (Schuster and Nakajima 2012; merges as in BPE, which `tokenizers` counts on).

    The same text gives the same ids: special tokens, then the others in alphabetical order.

    Args:
        documents: the text to count on; they are gone through two or three times.
        vocab_size: entries in all; fewer come out where the corpus has too few merges.
        seq_length: longest row of the model, noted as `model_max_length`.
        lowercase: whether text loses case and accents, as in BERT's uncased models.
        limit_alphabet: characters that are kept, the most frequent ones; the others are unknown.
        min_frequency: how often a pair of tokens must occur to become one.

    Returns:
        A `transformers.BertTokenizer`.

    Raises:
        UsageError: the characters of the text alone need a larger vocabulary.
    """
    from tokenizers import trainers
    from tqdm import tqdm
    from transformers import BertTokenizer

    def read(purpose: str) -> Iterator[str]:
        for text in tqdm(documents, desc=purpose, unit="doc", delay=2):
            yield tokenization.to_bytes(text).decode("utf-8", "replace")

    # Left to itself the trainer numbers the characters that continue words, and takes of equally frequent characters,
    # in the order of a hash table, another one each time; which of two equally frequent pairs becomes a token depends
    # on these numbers. So it is told which characters there are.
    backend = BertTokenizer(do_lower_case=lowercase).backend_tokenizer
    trainer = trainers.WordPieceTrainer(vocab_size=0, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    backend.train_from_iterator(read("finding characters"), trainer)
    alphabet = sorted(backend.get_vocab().keys() - set(SPECIAL_TOKENS))
    if len({token.removeprefix(CONTINUATION) for token in alphabet}) > limit_alphabet:
        counts = Counter[str]()
        for text in read("counting characters"):
            counts.update(backend.normalizer.normalize_str(text))
        alphabet = _most_frequent(alphabet, counts, limit_alphabet)
    limits: dict[str, Any] = {"vocab_size": vocab_size, "min_frequency": min_frequency, "limit_alphabet": 0}
    trainer = trainers.WordPieceTrainer(**limits, special_tokens=[*SPECIAL_TOKENS, *alphabet], show_progress=False)
    backend = BertTokenizer(do_lower_case=lowercase).backend_tokenizer
    backend.train_from_iterator(read("training a tokenizer"), trainer)
    tokens = backend.get_vocab()
    needed = f"at least {len(tokens)}, the characters of the text, or a smaller limit_alphabet"
    expect(len(tokens) <= vocab_size, "vocab_size", vocab_size, needed)
    ordered = [*SPECIAL_TOKENS, *sorted(tokens.keys() - set(SPECIAL_TOKENS))]
    vocabulary = {token: number for number, token in enumerate(ordered)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, model_max_length=seq_length)


def _most_frequent(alphabet: list[str], counts: Counter[str], limit: int) -> list[str]:
    """The tokens of the `limit` most frequent characters; of equally frequent ones the first in the alphabet."""
    characters = {token.removeprefix(CONTINUATION) for token in alphabet}
    kept = set(sorted(characters, key=lambda character: (-counts[character], character))[:limit])
    return [token for token in alphabet if token.removeprefix(CONTINUATION) in kept]


def load_or_train(
    name: str,
    sources: Sequence[Texts],
    *,
    vocab_size: int,
    seq_length: int,
    lowercase: bool,
    limit_alphabet: int = 1000,
    min_frequency: int = 2,
    cache_dir: Path,
) -> Any:
    """Load the tokenizer `name`, or for "" one that is trained on the beginnings of `sources` and kept in the cache.

    Args:
        name: a folder or Hub id; see `load_wordpiece`.
        sources: corpora; the same number of characters is read of each, `TRAINING_CHARACTERS` in all.
        vocab_size: see `train_wordpiece`.
        seq_length: see `train_wordpiece`.
        lowercase: see `train_wordpiece`.
        limit_alphabet: see `train_wordpiece`.
        min_frequency: see `train_wordpiece`.
        cache_dir: this node's cache folder.
    """
    if name:
        return load_wordpiece(name)
    sizes = (vocab_size, seq_length, lowercase, limit_alphabet, min_frequency)
    key = repr(("wordpiece, sorted", [source.fingerprint for source in sources], *sizes))
    folder = cache_dir / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not folder.exists():
        with one_builder(folder) as builds:
            if builds:
                parts = [Beginning(source, tokenization.TRAINING_CHARACTERS // len(sources)) for source in sources]
                tokenizer = train_wordpiece(_Chained(parts), *sizes)
                with written_aside(folder) as aside:
                    tokenizer.save_pretrained(aside)
    return load_wordpiece(str(folder))


@dataclass(frozen=True)
class _Chained:
    """Several corpora, one behind the other, as often as they are asked for."""

    parts: Sequence[Texts]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.parts)


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


def tells_words(tokenizer: Any) -> bool:
    """Whether its tokens say where words begin: those of WordPiece, byte-level BPE and SentencePiece do."""
    return _marks_continuations(tokenizer) or any(token.startswith(WORD_STARTS) for token in tokenizer.get_vocab())


def continues_word(tokenizer: Any) -> np.ndarray:
    """For each id whether its token continues the word before it, bool (ids,); what is masked whole is a word.

    In WordPiece a token says so, in byte-level BPE and SentencePiece a token says that it begins a word; there a word
    is what stands between blanks. None continues one where `tells_words` says no.
    """
    tokens, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    if _marks_continuations(tokenizer):
        inside = {token for token in tokens if token.startswith(CONTINUATION)}
    elif tells_words(tokenizer):
        inside = {token for token in tokens if not token.startswith(WORD_STARTS)} - special
    else:
        inside = set()
    continues = np.zeros(num_ids(tokenizer), dtype=bool)
    continues[[tokens[token] for token in inside]] = True
    return continues


def blank_before_words(tokenizer: Any) -> str:
    """What a sentence begins with so that its first token begins a word: in byte-level BPE a blank."""
    return " " if any(token.startswith(WORD_STARTS[0]) for token in tokenizer.get_vocab()) else ""


def _marks_continuations(tokenizer: Any) -> bool:
    """Of WordPiece; byte-level BPE may have a token ## for what it says."""
    return getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None) == CONTINUATION


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
