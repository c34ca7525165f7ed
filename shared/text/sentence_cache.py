"""Documents as tokenised sentences on disk: written once by several processes, read memory-mapped ever after.

    CACHE_DIR/sentences/KEY/{train,eval}/tokens.bin      every sentence, no special tokens
                                        /sentences.bin   int64: where each sentence ends in tokens.bin
                                        /documents.bin   int64: where each document ends in sentences.bin
                           /summary.json

The order of sentences, paragraphs and documents is kept; what a tokenizer of words loses of a text is counted. The key
covers the data, the tokenizer and the settings, and a folder is complete or absent and merged from parts, as in
`token_cache`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import shutil
import unicodedata
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError, expect
from shared.data import left_out
from shared.runtime.atomic_folder import one_builder, written_aside
from shared.text import tokenization
from shared.text.corpus_parts import Encoded, Merge, one_encoder, write_all_parts
from shared.text.document_pool import map_documents
from shared.text.documents import Texts
from shared.text.token_cache import SPLITS, cache_key, content_share, map_file, note_empty_documents
from shared.text.vocabulary import num_ids
from shared.text.wordpiece import blank_before_words

FORMAT_VERSION = 2
MOST_UNKNOWN = 0.2  # share of the characters above which what is learnt is how to guess [UNK]
LONGEST_SENTENCE = 1024  # tokens, more than any row holds; what is longer is no sentence and is cut
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # how PEP 383 writes bytes that are not UTF-8
_FAR_FROM_LATIN = re.compile("[\u0590-\u1fff]")  # behind Latin, Greek and Cyrillic, whose accents are no letters
_VOWEL_SIGN = "\u0941"  # of Devanagari
_BLANK_LINE = re.compile(r"\n\s*\n")


@dataclasses.dataclass
class Lost:
    """What of a corpus the model never sees.

    Attributes:
        characters: of its sentences in all.
        unknown: in tokens that are [UNK].
        marks: signs that are parts of letters in their script (vowels of Hindi), which `lowercase` takes for accents.
        bytes: that are no UTF-8, and became a character for all of them.
        documents: of one sentence or none, which give no pair.
        cuts: within sentences that are longer than `LONGEST_SENTENCE`.
    """

    characters: int = 0
    unknown: int = 0
    marks: int = 0
    bytes: int = 0
    documents: int = 0
    cuts: int = 0

    def add(self, other: "Lost") -> None:
        """Count another one's too."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def note(self, where: str) -> None:
        """Count it as left out of the corpus of that name."""
        unknown, signs = (f"{number / max(1, self.characters):.2%} of all" for number in (self.unknown, self.marks))
        left_out.note("unknown_characters", self.unknown, where=where, more=unknown)
        left_out.note("vowel_signs", self.marks, where=where, more=f"{signs}, but none with --no_lowercase")
        left_out.note("bytes_that_are_not_utf8", self.bytes, where=where)
        left_out.note("documents_without_a_pair", self.documents, where=where)
        left_out.note("cuts_within_sentences", self.cuts, where=where, more=f"after {LONGEST_SENTENCE:,} tokens")


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceCache:
    """One split of a corpus.

    Attributes:
        folder: where it lies.
        tokens: uint16 or uint32 (number of tokens,), memory-mapped.
        sentence_ends: int64 (number of sentences,), memory-mapped; sentence s is
            tokens[sentence_ends[s - 1]:sentence_ends[s]].
        document_ends: int64 (number of documents,), memory-mapped; document d is the sentences
            document_ends[d - 1]:document_ends[d], at least two.
    """

    folder: Path
    tokens: np.ndarray
    sentence_ends: np.ndarray
    document_ends: np.ndarray

    @property
    def lost(self) -> "Lost":
        """Of the whole corpus, both splits; several that were joined do not say it."""
        return Lost(**json.loads((self.folder.parent / "summary.json").read_text())["lost"])

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself; numpy would send it all tokens."""
        return open_sentence_cache, (self.folder.parent, self.folder.name)

    @property
    def fingerprint(self) -> str:
        """Name of the cache folder, which changes with data, tokenizer and settings."""
        return self.folder.parent.name

    def read(self, first: int, last: int) -> np.ndarray:
        """The tokens of sentences `first` to `last` (exclusive), int64."""
        start = int(self.sentence_ends[first - 1]) if first else 0
        return self.tokens[start : int(self.sentence_ends[last - 1])].astype(np.int64)


def split_corpus(
    documents: Texts,
    tokenizer: Any,
    *,
    language: str,
    one_sentence_per_line: bool,
    eval_fraction: float,
    cache_dir: Path,
    num_processes: int,
) -> tuple[SentenceCache, SentenceCache]:
    """Split a corpus into sentences and tokenise them, or find that done: documents to train on and to evaluate on.

    Documents are held out by their content, as in `token_cache.build_token_cache`, two of them at least.

    Args:
        documents: texts with a `fingerprint`; a blank line ends a sentence too, a lone line end does not.
        tokenizer: a fast transformers tokenizer.
        language: code that the rules of splitting depend on, such as en.
        one_sentence_per_line: lines are sentences, and blank lines end documents (the format of Devlin et al.'s code).
        eval_fraction: share of the documents held out for evaluation; 1 = all.
        cache_dir: this node's folder for tokenised data.
        num_processes: splitting processes.

    Raises:
        UsageError: the corpus is unreadable, or a split has fewer than two documents of two sentences or more.
    """
    before = blank_before_words(tokenizer)
    whole = (FORMAT_VERSION, language, one_sentence_per_line, *([before] if before else []))
    settings = (*whole[:3], eval_fraction, *whole[3:])
    fingerprints = (documents.fingerprint, tokenization.fingerprint(tokenizer))
    folder = cache_dir / "sentences" / cache_key(*fingerprints, settings)
    parts, place = folder.with_name(f"parts-{cache_key(*fingerprints, whole)}"), getattr(documents, "place", "the text")
    if not folder.exists():
        with one_encoder(folder, parts) as builds:
            if builds:
                how: dict[str, Any] = {
                    "language": language,
                    "one_sentence_per_line": one_sentence_per_line,
                    "before": before,
                }
                encode = functools.partial(_split, tokenizer=tokenizer, num_processes=num_processes, **how)
                tasks = write_all_parts(parts, documents, encode, folder)
                _merge(parts, tasks, folder, eval_fraction)
    note_empty_documents(folder, documents)
    train, held_out = (open_sentence_cache(folder, split) for split in SPLITS)
    lost = train.lost
    lost.note(place)
    share = lost.unknown / max(1, lost.characters)
    # Words of more than 100 characters are unknown to WordPiece, as in text without blanks; so are rare characters.
    expected = "words that the tokenizer knows; {:.1%} of the characters are in words that are unknown to it, "
    expected += "as where words have no blanks between them"
    expect(share <= MOST_UNKNOWN, "data", getattr(documents, "name", ""), expected.format(share))
    return train, held_out


def join_caches(caches: Sequence[SentenceCache], cache_dir: Path) -> SentenceCache:
    """Several corpora as one, document after document in their order; what they hold is copied, once.

    Args:
        caches: of the same tokenizer.
        cache_dir: this node's folder for tokenised data.
    """
    if len(caches) == 1:
        return caches[0]
    key = cache_key(FORMAT_VERSION, "joined", *(f"{cache.fingerprint} {cache.folder.name}" for cache in caches))
    folder = cache_dir / "sentences" / key
    if not folder.exists():
        with one_builder(folder) as builds:
            if builds:
                with written_aside(folder) as aside:
                    _write_joined(aside, caches)
    return open_sentence_cache(folder, SPLITS[0])


def _write_joined(folder: Path, caches: Sequence[SentenceCache]) -> None:
    split = folder / SPLITS[0]
    split.mkdir()
    tokens = sentences = 0
    with contextlib.ExitStack() as stack:
        names = ("tokens", "sentences", "documents")
        files = {name: stack.enter_context((split / f"{name}.bin").open("wb")) for name in names}
        for cache in caches:
            with (cache.folder / "tokens.bin").open("rb") as source:
                shutil.copyfileobj(source, files["tokens"])
            files["sentences"].write((cache.sentence_ends + tokens).tobytes())
            files["documents"].write((cache.document_ends + sentences).tobytes())
            tokens, sentences = tokens + len(cache.tokens), sentences + len(cache.sentence_ends)
    (folder / "summary.json").write_text(json.dumps({"dtype": caches[0].tokens.dtype.name}))


def open_sentence_cache(folder: Path, split: str) -> SentenceCache:
    """Map one split of a cache folder into memory."""
    dtype = np.dtype(json.loads((folder / "summary.json").read_text())["dtype"])
    types = {"tokens": dtype, "sentences": np.int64, "documents": np.int64}
    files = [map_file(folder / split / f"{name}.bin", numbers) for name, numbers in types.items()]
    return SentenceCache(folder / split, *(file.view(np.ndarray) for file in files))  # memmap's own indexing is slow


def _merge(parts: Path, tasks: int, folder: Path, eval_fraction: float) -> None:
    nothing = dict.fromkeys(("tokens", "sentences", "documents"), 0)
    begun = {"first_shares": [], "lost": dataclasses.asdict(Lost()), **{split: {**nothing} for split in SPLITS}}
    merge = Merge(parts, tasks, folder, begun)
    state = merge.state
    for part in merge.parts():
        for name, numbers in zip(state["lost"], part["lost"].reshape(-1, len(state["lost"])).T, strict=True):
            state["lost"][name] += int(numbers.sum())
        found = dict.fromkeys([*state["first_shares"], *part["shares"].tolist()])  # in order, each once
        state["first_shares"] = list(itertools.islice(found, 2))
        held_out = (part["shares"] < eval_fraction) | np.isin(part["shares"], state["first_shares"])
        held_out &= eval_fraction > 0
        arrays = {}
        for split, documents in zip(SPLITS, (~held_out, held_out), strict=True):
            sentences, counts = np.repeat(documents, part["documents"]), state[split]
            chosen = {
                "tokens": part["tokens"][np.repeat(sentences, part["sentences"])],
                "sentences": counts["tokens"] + np.cumsum(part["sentences"][sentences]),
                "documents": counts["sentences"] + np.cumsum(part["documents"][documents]),
            }
            for name, array in chosen.items():
                arrays[f"{split}/{name}"] = array
                counts[name] += len(array)
        state["dtype"] = part["tokens"].dtype.name
        merge.append(arrays)
    needed = {"train": eval_fraction < 1, "eval": eval_fraction > 0}
    for split in SPLITS:
        if needed[split] and state[split]["documents"] < 2:
            shutil.rmtree(parts)
            raise UsageError(
                f"data: expected at least 2 documents of 2 sentences or more to {split} on, for a next sentence from "
                f"another document, got {state[split]['documents']} ({state['lost']['documents']} have no two; equal "
                "ones stay together)"
            )
    counted = {"documents": {split: state[split]["documents"] for split in SPLITS}, "lost": state["lost"]}
    merge.finish({"dtype": state["dtype"], **counted, "empty_documents": merge.empty_documents})


def _split(
    documents: Iterable[str],
    tokenizer: Any,
    num_processes: int,
    *,
    language: str,
    one_sentence_per_line: bool,
    before: str,
) -> Generator[Encoded, None, None]:
    """Yield what batches of documents become, in order.

    Of documents of two sentences or more tokens: of all sentences; sentences: int64, tokens of each; documents: int64,
    sentences of each; shares: float64, of the content. Of all documents lost: int64, the fields of a `Lost`.
    """
    dtype = np.uint16 if num_ids(tokenizer) <= 1 << 16 else np.uint32
    return map_documents(
        _split_batch,
        documents,
        start=_start_worker,
        arguments=(
            *(tokenizer.backend_tokenizer.to_str(), tokenizer.unk_token_id, language, one_sentence_per_line),
            *(before, dtype),
        ),
        num_processes=num_processes,
        description="splitting into sentences",
    )


_worker: dict[str, Any] = {}


def _start_worker(
    tokenizer_json: str, unknown: int, language: str, one_sentence_per_line: bool, before: str, dtype: Any
) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer_json)
    backend.encode_special_tokens = True  # a text that spells [SEP] has no separator there
    _worker.update(backend=backend, unknown=unknown, language=language, one_sentence_per_line=one_sentence_per_line)
    _worker.update(before=before, dtype=dtype)
    normalizer = backend.normalizer
    _worker["loses_marks"] = normalizer is not None and normalizer.normalize_str(_VOWEL_SIGN) == ""


def _split_batch(texts: list[str]) -> list[Encoded]:
    """A text may hold several documents, where blank lines end them."""
    tokens: list[np.ndarray] = [np.empty(0, dtype=np.uint32)]
    sentences, counts, shares, lost = [], [], [], Lost()
    for text in texts:
        lost.bytes += len(_ESCAPED_BYTE.findall(text))
        for document in _documents(_readable(text)):
            ids, share, of_document = _encode(document)
            lengths = [
                min(LONGEST_SENTENCE, len(one) - at) for one in ids for at in range(0, len(one), LONGEST_SENTENCE)
            ]
            lost.add(of_document)
            lost.cuts += len(lengths) - len(ids)
            lost.documents += len(lengths) < 2
            if len(lengths) >= 2:
                tokens += ids
                sentences += lengths
                counts.append(len(lengths))
                shares.append(share)
    arrays = {
        "tokens": np.concatenate(tokens).astype(_worker["dtype"]),
        "sentences": np.array(sentences, dtype=np.int64),
        "documents": np.array(counts, dtype=np.int64),
        "shares": np.array(shares, dtype=np.float64),
        "lost": np.array(dataclasses.astuple(lost), dtype=np.int64),
    }
    return [Encoded(len(texts), sum(map(len, texts)), arrays)]


def _documents(text: str) -> list[list[str]]:
    if _worker["one_sentence_per_line"]:
        return [document.splitlines() for document in _BLANK_LINE.split(text)]
    import sentencex

    return [sentencex.segment(_worker["language"], text)]


def _encode(sentences: list[str]) -> tuple[list[np.ndarray], float, Lost]:
    begun = [_worker["before"] + sentence for sentence in sentences]
    encodings = _worker["backend"].encode_batch_fast(begun, add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings if encoding.ids]
    lost = Lost(characters=sum(map(len, sentences)))
    for sentence, encoding in zip(sentences, encodings, strict=True):
        if _worker["unknown"] in encoding.ids:  # the fast encoding has no places in the text
            placed = _worker["backend"].encode(sentence, add_special_tokens=False)
            pairs = zip(placed.ids, placed.offsets, strict=True)
            lost.unknown += sum(end - start for token, (start, end) in pairs if token == _worker["unknown"])
        if _worker["loses_marks"]:
            lost.marks += sum(map(_is_part_of_letter, _FAR_FROM_LATIN.findall(sentence)))
    return ids, content_share("\n".join(sentences).encode()), lost


def _is_part_of_letter(character: str) -> bool:
    return unicodedata.category(character) == "Mn"


def _readable(text: str) -> str:
    """Bytes that are no UTF-8 become the replacement character: sentences and words have no bytes."""
    return tokenization.to_bytes(text).decode("utf-8", "replace")
