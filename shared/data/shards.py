"""Records of a data set that is read as it arrives: its shards, dealt to the processes, and where each of them is.

The shards (files, or the data set's own) are shuffled each pass and dealt, as many to each process; those that are
left, fewer than processes, are cut, so that all come to the end of a pass after about as many records. Records come in
their order within a shard. Whoever reads them shuffles a window of them at a time. The state that a checkpoint keeps is
where the window began and how many of it are used up; resuming reads that window again, so all is the same as without
the stop. What stays approximate: with another number of processes the shards are dealt anew, from the next pass on.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict, TypeVar

import numpy as np

from shared.command_line import UsageError
from shared.data.randomness import derive_seed, shuffled_indices

logger = logging.getLogger(__name__)

Record = TypeVar("Record")


class StreamState(TypedDict):
    """Where one process is in a stream: enough to go on exactly with the same number of processes."""

    num_processes: int
    epoch: int  # pass over the shards
    shard: int  # place in this process's order of them
    record: int  # records of that shard that earlier windows used
    used: int  # of the current window


def start_of_stream(num_processes: int) -> StreamState:
    """The state before the first record."""
    return {"num_processes": num_processes, "epoch": 0, "shard": 0, "record": 0, "used": 0}


def resumed_state(states: Sequence[StreamState], rank: int, num_processes: int) -> StreamState:
    """The state from which process `rank` goes on.

    Args:
        states: of every process, as a checkpoint kept them; with another number of them than `num_processes` all go
            on with the next pass, none = from the start.
        rank: this process.
        num_processes: processes in all.
    """
    if len(states) == num_processes:
        return states[rank]
    start = start_of_stream(num_processes)
    if not states:
        return start
    logger.warning("the stream was read by %d processes: a new pass over it begins", len(states))
    return {**start, "epoch": 1 + max(state["epoch"] for state in states)}


def shares_of(rank: int, processes: int, order: Sequence[int]) -> list[tuple[int, range]]:
    """What a process reads in a pass: shards, and which of their records, by what is left of their number / processes.

    Args:
        rank: this process.
        processes: in all.
        order: of the shards in this pass. As many as can be dealt evenly are whole; those left have `processes` parts
            each, and of all these parts in a line each process has a stretch of the same length, in two shards at most.
            Of fewer shards than processes each process has a part of every one.
    """
    if len(order) < processes:  # a stretch of short shards could hold no record at all
        return [(shard, range(rank, rank + 1)) for shard in order]
    num_left = len(order) % processes
    whole, left = order[: len(order) - num_left], order[len(order) - num_left :]
    mine = [(shard, range(processes)) for shard in whole[rank::processes]]
    for place, shard in enumerate(left):
        first, end = (min(max(edge * num_left - place * processes, 0), processes) for edge in (rank, rank + 1))
        if first < end:
            mine.append((shard, range(first, end)))
    return mine


def deal_records(
    shards: Sequence[Iterable[Record]], seed: int, rank: int, state: StreamState
) -> Iterator[tuple[Record, StreamState]]:
    """This process's records without end, each with the state of a window that begins after it.

    Args:
        shards: the same records in the same order each time.
        seed: of the order of shards.
        rank: this process.
        state: where to go on.

    Raises:
        UsageError: in a whole pass there is no record for this process.
    """
    processes, epoch, first_shard, skipped = state["num_processes"], state["epoch"], state["shard"], state["record"]
    has_whole_shards = len(shards) >= processes
    while True:
        order = shuffled_indices(np.arange(len(shards)), len(shards), derive_seed(seed, "shards", epoch))
        mine = shares_of(rank, processes, order.tolist())
        is_futile = first_shard == skipped == 0  # unless this pass, from its start on, comes upon a record
        for place in range(first_shard, len(mine)):
            shard, parts = mine[place]
            for number, record in enumerate(shards[shard]):
                if number < skipped or number % processes not in parts:
                    continue
                is_futile = False
                yield (
                    record,
                    {"num_processes": processes, "epoch": epoch, "shard": place, "record": number + 1, "used": 0},
                )
            skipped = 0
        if is_futile and not (has_whole_shards and any(True for shard in shards for _ in shard)):
            raise UsageError(
                f"data: expected records to train on in a pass over the stream, got none for process {rank} of "
                f"{processes}: all are held out, or there are fewer than processes"
            )
        epoch, first_shard = epoch + 1, 0
