"""What processes do together, with real processes."""

import itertools
import os
import re
import socket
from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.command_line import UsageError
from shared.runtime.collectives import check_shared_folder, equal_share
from tests import launching

PROGRAM = Path(__file__).with_name("launch_program.py")


def facts(output: str) -> list[tuple[bool, float, int]]:
    """(goes first, when it had its turn, threads) of each process."""
    found = re.search(r"^processes \d+ engine \w+ facts (.*)$", output, re.MULTILINE)
    assert found, output
    return literal_eval(found[1])


@given(number=st.integers(0, 50), processes=st.integers(1, 7))
def test_equal_shares_are_equal_and_hold_everything(number: int, processes: int) -> None:
    ranks = [SimpleNamespace(process_index=rank, num_processes=processes) for rank in range(processes)]
    shares = [equal_share(rank, number) for rank in ranks]
    assert len({len(share) for share in shares}) == 1
    assert set(range(number)) <= set(itertools.chain.from_iterable(shares)) <= set(range(number + processes))
    assert sum(map(len, shares)) < number + processes


@pytest.mark.slow
def test_two_processes_share_the_cores_and_wait_longer_than_the_time_out(all_cores: int) -> None:
    """The first takes six seconds, twice what any collective of training may take."""
    status, output = launching.launch("multi_cpu", PROGRAM, "6")
    assert status == 0, output
    assert "processes 2 engine MULTI_CPU" in output
    (first, first_time, threads), (second, second_time, other_threads) = facts(output)
    assert (first, second) == (True, False)
    assert second_time > first_time
    assert threads == other_threads == max(1, all_cores // 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "message"), [("first", "data: expected some"), ("main", "run_dir: expected another")]
)
def test_error_of_one_process_is_the_only_message(where: str, message: str) -> None:
    status, output = launching.launch("multi_cpu", PROGRAM, "0.1", where)
    assert status == 1
    assert output.count(f"error: {message}") == 1
    assert "error: another process ended" not in output
    launching.assert_no_traceback(output)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["first", "second"])
def test_error_of_one_machine_ends_the_others_with_its_message(where: str) -> None:
    """As where one has no data: the other would wait for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ("--main_process_ip=127.0.0.1", f"--main_process_port={port}")
    machines = [
        launching.start(
            "multi_node", PROGRAM, "3", where, launcher=(*launching.ON_CPUS, *address, f"--machine_rank={rank}")
        )
        for rank in (0, 1)
    ]
    outputs = [launching.finish(machine, timeout=90) for machine in machines]
    for machine, output in zip(machines, outputs, strict=True):
        assert machine.returncode == 1, output
        assert output.count("error: data: expected some") == 1
        launching.assert_no_traceback(output)


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        ("links", ""),
        ("locks:ENOLCK", ""),
        ("folders:ENOSYS", "expected a file system that renames folders, got Function not implemented"),
        ("append", "expected a file system that appends to files, got Operation not supported"),
        ("replace:EPERM", "expected a file system that replaces a file by another, got Operation not permitted"),
    ],
)
def test_what_the_file_system_of_a_run_folder_lacks_is_said(tmp_path: Path, lacking: str, expected: str) -> None:
    alone = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
    with launching.odd_mount(tmp_path, lacking) as mount:
        said = ""
        try:
            check_shared_folder(alone, mount / "run")
        except UsageError as error:
            said = str(error).removeprefix(f"output_dir: {str(mount / 'run')!r}: ")
        assert said == expected
        assert os.listdir(mount / "run") == []
