"""Print what a large cluster would read: 1,024 processes, 100 billion tokens; no process is started.

    python tests/benchmarks/cluster.py        # half a minute on one core

Order, epochs, mixture and dealt shards are functions of (seed, step, rank), so any rank can be asked for here.
"""

import functools
import itertools
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shared.data.randomness import shuffled_indices
from shared.data.sample_order import mixture_sources, samples_of_update
from shared.data.shards import shares_of

PROCESSES, TOKENS, SEQ_LENGTH, BATCH = 1024, 100_000_000_000, 1024, 2048
ROWS = TOKENS // SEQ_LENGTH
SHARES = (0.7, 0.2999, 0.0001)  # of a mixture
AT_ONCE = 1 << 22


def main() -> None:
    """Measure and print, one line a figure."""
    show(f"every one of {ROWS:,} rows once in an epoch", every_row_once)
    for step in (0, ROWS // BATCH, 1_000_000):  # the second reaches into the next epoch
        show(f"update {step:,}: {PROCESSES:,} processes see what one would", functools.partial(same_on_all, step))
    start = time.perf_counter()
    place = {"global_batch_size": BATCH, "rank": PROCESSES - 1, "num_processes": PROCESSES}
    samples_of_update(47_000, [ROWS], [1.0], seed=1, **place)
    milliseconds = 1e3 * (time.perf_counter() - start)
    say(f"samples of one process at update 47,000, with a seed not used before: {milliseconds:.2f} ms")
    show(f"a mixture of {', '.join(map(str, SHARES))}, 20 M samples: shares and running numbers", mixes)
    show(f"1,500 shards dealt to {PROCESSES:,} processes, each part once", deals)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    say(f"peak memory, libraries included: {peak:.0f} MiB")


def show(what: str, check: Callable[[], bool]) -> None:
    """Whether it holds, and the seconds that it took."""
    start = time.perf_counter()
    answer = "yes" if check() else "NO"
    say(f"{what}: {answer}, {time.perf_counter() - start:.1f} s")


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 (the output of a command)


def every_row_once() -> bool:
    """An epoch's order, by a bit for each row."""
    seen = np.zeros(ROWS, dtype=bool)
    for first in range(0, ROWS, AT_ONCE):
        seen[shuffled_indices(np.arange(first, min(first + AT_ONCE, ROWS)), ROWS, 0)] = True
    return bool(seen.all())


def same_on_all(step: int) -> bool:
    """The processes' samples, one behind the other, are those of one process."""
    options: dict[str, Any] = {"sizes": [ROWS], "weights": [1.0], "seed": 0, "global_batch_size": BATCH}
    whole = samples_of_update(step, **options, rank=0, num_processes=1)
    ranks = range(PROCESSES)
    parts = [samples_of_update(step, **options, rank=rank, num_processes=PROCESSES) for rank in ranks]
    return list(itertools.chain.from_iterable(parts)) == whole


def mixes() -> bool:
    """Each source has its share, to a sample in a block, and its samples are numbered without a gap."""
    counts, number = np.zeros(len(SHARES), dtype=np.int64), 20_000_000
    for first in range(0, number, AT_ONCE):
        sources, numbers = mixture_sources(np.arange(first, min(first + AT_ONCE, number)), list(SHARES), 0)
        for source in range(len(SHARES)):
            found = np.sort(numbers[sources == source])
            if not np.array_equal(found, counts[source] + np.arange(len(found))):
                return False
            counts[source] += len(found)
    return bool(np.allclose(counts / number, SHARES, rtol=0.01))


def deals() -> bool:
    """Every part of every shard goes to one process."""
    order = list(range(1500))
    shares = [share for rank in range(PROCESSES) for share in shares_of(rank, PROCESSES, order)]
    counts = Counter((shard, part) for shard, parts in shares for part in parts)
    return len(counts) == len(order) * PROCESSES and set(counts.values()) == {1}


if __name__ == "__main__":
    main()
