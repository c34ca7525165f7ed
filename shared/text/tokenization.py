"""Byte-level BPE: train one, load one, and encode or decode exactly, whatever the bytes."""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError, one_line
from shared.runtime.atomic_folder import one_builder, written_aside
from shared.text.documents import Beginning, Texts
from shared.text.vocabulary import special_ids

END_OF_TEXT = "<|endoftext|>"
CONVERSATION_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TRAINING_CHARACTERS = 1 << 28  # of the corpora that the merges are counted on; more changes them little
_BLOCK_CHARACTERS = 1 << 17  # long texts go in blocks: encoding needs 100 bytes a character, and slows down
_ESCAPED_BYTES = re.compile("([\udc80-\udcff]+)")  # how PEP 383 writes bytes that are not UTF-8
_OTHER_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # JSON can spell them


def train_byte_level_bpe(documents: Iterable[str], vocab_size: int, seq_length: int) -> Any:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in Radford et al. 2019, section 2.2).

    The alphabet holds all 256 bytes, so nothing is ever unknown; one special token begins and ends a document. Those of
    a conversation are there from the start (Karpathy 2025, nanochat), so that fine-tuning adds no rows to the model.

    Args:
        documents: the text to count on.
        vocab_size: entries in all; fewer come out where the corpus has too few merges.
        seq_length: longest row of the model, noted as `model_max_length`.

    Returns:
        A `transformers.PreTrainedTokenizerFast` that puts the special token before a prompt.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *CONVERSATION_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    blocks = (block for document in documents for block in _blocks(document))
    tokenizer.train_from_iterator((to_bytes(block).decode("utf-8", "ignore") for block in blocks), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=seq_length,
        clean_up_tokenization_spaces=False,
    )


def load_or_train(name: str, sources: Sequence[Texts], *, vocab_size: int, seq_length: int, cache_dir: Path) -> Any:
    """Load the tokenizer `name`, or for "" one that is trained on the beginnings of `sources` and kept in the cache.

    Args:
        name: see `load_tokenizer`.
        sources: corpora; the same number of characters is read of each, `TRAINING_CHARACTERS` in all.
        vocab_size: see `train_byte_level_bpe`.
        seq_length: see `train_byte_level_bpe`.
        cache_dir: this node's cache folder.
    """
    from tqdm import tqdm

    if name:
        return load_tokenizer(name)
    key = repr(([source.fingerprint for source in sources], vocab_size, seq_length, CONVERSATION_TOKENS))
    folder = cache_dir / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not folder.exists():
        with one_builder(folder) as builds:
            if builds:
                parts = (Beginning(source, TRAINING_CHARACTERS // len(sources)) for source in sources)
                documents = tqdm(itertools.chain.from_iterable(parts), desc="training a tokenizer", unit="doc", delay=2)
                tokenizer = train_byte_level_bpe(documents, vocab_size, seq_length)
                with written_aside(folder) as aside:
                    tokenizer.save_pretrained(aside)
    return load_tokenizer(str(folder))


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer of causal language models from a folder or the Hub.

    Raises:
        UsageError: see `load_fast`; or it has no token that ends a document.
    """
    tokenizer = load_fast(name)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"tokenizer: {name!r}: expected one with an end token (eos_token)")
    return tokenizer


def load_fast(name: str, **options: Any) -> Any:
    """Load any tokenizer from a folder or the Hub; no code that comes with it is run, and it neither cuts nor pads.

    Args:
        name: the folder or Hub id.
        options: passed on to `from_pretrained`.

    Raises:
        UsageError: it is not there, or has no fast version.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, use_fast=True, **options)
    except Exception as error:  # hub, cache and format errors have no common class
        reason = one_line(error)
        where = "" if os.path.exists(name) else "there is no such folder here, and as a Hub id: "
        expected = f"expected a tokenizer's folder or Hub id, also where init names it: {where}{reason}"
        raise UsageError(f"tokenizer: {name!r}: {expected}") from error
    if not tokenizer.is_fast:
        raise UsageError(f"tokenizer: {name!r}: expected one with a tokenizer.json")
    if len(tokenizer) <= len(
        set(tokenizer.all_special_ids)
    ):  # what the library makes of a folder that has a model alone
        raise UsageError(f"tokenizer: {name!r}: expected a tokenizer's folder or Hub id, this has no vocabulary")
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json cut or pad all that they encode
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def kept_tokens(tokenizer: Any) -> list[int]:
    """The ids that `train_byte_level_bpe` keeps for conversations, of which pre-training saw none; [] of others."""
    known = tokenizer.get_vocab()
    return [known[token] for token in CONVERSATION_TOKENS] if set(CONVERSATION_TOKENS) <= known.keys() else []


def to_bytes(text: str) -> bytes:
    """The bytes that `text` stands for: an escaped byte is that byte, another lone surrogate its three bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return _OTHER_SURROGATES.sub(_escape, text).encode("utf-8", "surrogateescape")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")


def encode(backend: Any, text: str) -> np.ndarray:
    """Token ids of `text` alone, no special token added and none recognised inside it.

    Args:
        backend: a `tokenizers.Tokenizer`.
        text: may hold lone surrogates; those bytes become single-byte tokens.

    Returns:
        int64 (number of tokens,)
    """
    backend.encode_special_tokens = True  # a document that spells <|endoftext|> must not end there
    ids: list[int] = []
    for block in _blocks(text):
        for part in filter(None, _ESCAPED_BYTES.split(to_bytes(block).decode("utf-8", "surrogateescape"))):
            if _ESCAPED_BYTES.match(part):
                ids += _encode_bytes(backend, to_bytes(part))
            else:
                # The fast one leaves out each token's place in the text: a tenth to a half less time.
                ids += backend.encode_batch_fast([part], add_special_tokens=False)[0].ids
    return np.array(ids, dtype=np.int64)


def decode_bytes(backend: Any, ids: Iterable[int]) -> bytes:
    """The exact bytes of byte-level tokens, also where they are no UTF-8; special tokens give their name."""
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    parts = []
    for token_id in ids:
        token = backend.id_to_token(int(token_id)) or ""  # a model's vocabulary may be padded
        is_bytes = all(character in byte_of for character in token)
        parts.append(bytes(byte_of[character] for character in token) if is_bytes else token.encode())
    return b"".join(parts)


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _BLOCK_CHARACTERS:
        end = start + _BLOCK_CHARACTERS
        line_end = text.rfind("\n", start, end)
        end = line_end + 1 if line_end > start else end
        yield text[start:end]
        start = end
    yield text[start:]


def _encode_bytes(backend: Any, data: bytes) -> list[int]:
    ids = []
    for byte, character in ((byte, _byte_characters()[byte]) for byte in data):
        # Llama 2's vocabulary has names for the bytes, GPT-2's has characters.
        token_id = backend.token_to_id(f"<0x{byte:02X}>")
        ids.append(backend.token_to_id(character) if token_id is None else token_id)
    # A vocabulary without bytes gets the replacement character.
    return backend.encode("\ufffd", add_special_tokens=False).ids if None in ids else ids


@functools.cache
def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


def fingerprint(tokenizer: Any) -> str:
    """Changes with anything that changes the ids."""
    text = json.dumps([tokenizer.backend_tokenizer.to_str(), special_ids(tokenizer)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
