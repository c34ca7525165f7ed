"""Work on the documents of a corpus by several processes: results in order, memory flat however long the corpus.

The reader hands over about 1 MiB of text at a time, and at most a few pieces are on their way.
"""

import collections
import concurrent.futures
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

_BATCH_CHARACTERS = 1 << 20


def map_documents(
    function: Callable[[list[str]], list[Any]],
    documents: Iterable[str],
    *,
    start: Callable[..., None],
    arguments: tuple[Any, ...],
    num_processes: int,
    description: str,
) -> Generator[Any, None, None]:
    """Yield `function`'s results, in the order of the documents, with a progress bar.

    Args:
        function: takes a list of documents, returns a list of results; importable, since it runs in the processes.
        documents: texts; empty ones are passed over.
        start: called once in each process, with `arguments`.
        arguments: what travels to each process once.
        num_processes: working processes.
        description: of the progress bar, such as "tokenising".
    """
    from tqdm import tqdm

    # Forked children see only numpy and tokenizers' own state; spawning would import the recipe again in each.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(num_processes, context, _start, (start, arguments)) as pool,
        tqdm(unit="char", unit_scale=True, desc=description, delay=2) as progress,
    ):
        for batch, results in _in_order(pool, function, _batches(documents), limit=2 * num_processes + 1):
            yield from results
            progress.update(sum(map(len, batch)))


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if sys.platform == "linux":  # else the workers of a killed run would wait for work for ever
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    start(*arguments)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        if not document:
            continue
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(
    pool: concurrent.futures.Executor, function: Callable, batches: Iterator[list[str]], limit: int
) -> Iterator[tuple[list[str], list[Any]]]:
    """Map in order with at most `limit` batches read ahead; `Executor.map` would read them all."""
    waiting: collections.deque = collections.deque()
    for batch in batches:
        waiting.append((batch, pool.submit(function, batch)))
        if len(waiting) >= limit:
            batch, future = waiting.popleft()
            yield batch, future.result()
    for batch, future in waiting:
        yield batch, future.result()
