"""What processes do together, with real processes."""

import re
from ast import literal_eval
from pathlib import Path

import pytest

from tests import launching

PROGRAM = Path(__file__).with_name("launch_program.py")


def facts(output: str) -> list[tuple[bool, float, int]]:
    """(goes first, when it had its turn, threads) of each process."""
    found = re.search(r"^processes \d+ engine \w+ facts (.*)$", output, re.MULTILINE)
    assert found, output
    return literal_eval(found[1])


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
