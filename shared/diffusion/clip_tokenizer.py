"""CLIP's tokenizer, trained on captions: byte-level BPE of lower-cased words (Radford et al. 2021, section 2.4).

The result is a function of the captions, in whatever order, and of the vocabulary's size. The trainers of `tokenizers`
give other merges each time where pairs are equally frequent, and leave out bytes that end no word of the captions; a
rare character at the end of a prompt's word would then be the end token.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from shared.command_line import expect

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"

Pair = tuple[str, str]


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """Train a tokenizer whose vocabulary has the order of CLIP's, with the end token as padding (as in CLIP ViT-L).

    The order is: 256 bytes, the same at the end of a word, merges from the first to the last, start and end token. So
    nothing is unknown.

    Args:
        captions: the text to count on.
        vocab_size: entries in all, 49,408 in CLIP; fewer come out where the captions have too few pairs to merge.
        max_length: tokens of a row with start and end, 77 in CLIP; noted as `model_max_length`.

    Returns:
        A `transformers.CLIPTokenizer`.

    Raises:
        UsageError: the vocabulary has no room for the bytes and the two special tokens.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())  # the characters that stand for bytes, in CLIP's order
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols)]
    smallest = len(tokens) + 2
    expected = f"at least {smallest}, for each byte inside and at the end of a word and two special tokens"
    expect(vocab_size >= smallest, "vocab_size", vocab_size, expected)
    merges = _learn_merges(_count_words(captions), vocab_size - smallest)
    tokens += [*(first + second for first, second in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # The library's annotation says texts; it hands merges on to the BPE of `tokenizers`, which takes pairs.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)  # type: ignore[arg-type]


def _count_words(captions: Iterable[str]) -> Counter[str]:
    """Words as CLIP's tokenizer cuts them, each byte a character."""
    from transformers import CLIPTokenizer

    backend = CLIPTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for caption in captions:
        normalized = backend.normalizer.normalize_str(caption)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized))
    return words


def _learn_merges(words: Counter[str], most: int) -> list[Pair]:
    """Merge the most frequent pair of neighbours, again and again (Sennrich et al. 2016, section 3.2).

    Of equally frequent pairs the one that sorts first is merged. No two merges give the same token: what becomes one
    token has been put together in the same order wherever it stands.
    """
    counts = list(words.values())
    spellings = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    frequencies: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # words that have, or had, the pair
    for place, spelling in enumerate(spellings):
        for pair in pairwise(spelling):
            frequencies[pair] += counts[place]
            places[pair].add(place)
    queue = [(-frequency, pair) for pair, frequency in frequencies.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    while queue and len(merges) < most:
        negative, pair = heapq.heappop(queue)
        if -negative != frequencies[pair]:
            continue  # other merges have made the pair rarer, and it is queued again with what is left of it
        merges.append(pair)
        changes: Counter[Pair] = Counter()
        for place in places.pop(pair):
            before = spellings[place]
            spellings[place] = after = _merge(before, pair)
            for old in pairwise(before):
                changes[old] -= counts[place]
            for new in pairwise(after):
                changes[new] += counts[place]
                places[new].add(place)
        for changed, difference in changes.items():
            frequencies[changed] += difference
            if difference and frequencies[changed]:
                heapq.heappush(queue, (-frequencies[changed], changed))
    return merges


def _merge(spelling: list[str], pair: Pair) -> list[str]:
    """Join the pair wherever it stands, from left to right."""
    merged: list[str] = []
    position = 0
    while position < len(spelling):
        is_pair = tuple(spelling[position : position + 2]) == pair
        merged.append("".join(pair) if is_pair else spelling[position])
        position += 2 if is_pair else 1
    return merged
