"""Real signals to a real process: the first is noted and the loop ends by itself, a second Ctrl-C ends it at once."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.runtime.signals import StopSignals

ROOT = Path(__file__).parents[3]
PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from shared.runtime.signals import StopSignals

stop = StopSignals()
assert not stop.received
print("ready", flush=True)
seconds = 0.0
while not stop.received and seconds < 20:
    time.sleep(0.05)
    seconds += 0.05
print("stopping", stop.received, flush=True)
time.sleep(float(sys.argv[1]))
print("saved", stop.received, flush=True)
"""


@pytest.fixture
def start() -> Iterator[Callable[[float], subprocess.Popen]]:
    """Start the program, which takes so many seconds to save after it has seen the signal."""
    processes = []

    def starter(seconds_to_save: float) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM, str(seconds_to_save)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "ready\n"
        return processes[-1]

    yield starter
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_lets_the_loop_end_by_itself(start, number):
    process = start(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "stopping True\nsaved True\n", "")


def test_without_a_signal_nothing_is_received(start):
    process = start(0)
    time.sleep(0.3)
    assert process.poll() is None


def test_a_second_ctrl_c_ends_at_once(start):
    process = start(30)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopping True\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert (out, err) == ("", "")


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)],
)
def test_any_other_second_signal_lets_it_finish_saving(start, first, second):
    process = start(0.5)
    process.send_signal(first)
    assert process.stdout.readline() == "stopping True\n"
    process.send_signal(second)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "saved True\n", "")


def test_ctrl_c_ends_a_process_that_sigterm_is_stopping_when_pressed_twice(start):
    process = start(30)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping True\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT


def test_restored_signals_do_what_they_did() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignals()
    assert signal.getsignal(signal.SIGTERM) != before
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) == before
