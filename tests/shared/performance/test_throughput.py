import time

import pytest

from shared.performance.throughput import Throughput


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture
def throughput(clock):
    return Throughput(flops_per_sample=1000.0, peak_flops_total=8000.0)


def test_rates_of_one_window(clock, throughput):
    for _ in range(2):
        with throughput.waiting_for_data():
            clock.seconds += 1
        clock.seconds += 4
        throughput.add(samples=10, units=640)
    assert throughput.read("tokens") == {
        "perf/tokens_per_second": pytest.approx(1280 / 10),
        "perf/mfu": pytest.approx(20 * 1000 / (10 * 8000)),
        "perf/data_wait_fraction": pytest.approx(0.2),
    }


def test_reading_starts_a_new_window(clock, throughput):
    with throughput.waiting_for_data():
        clock.seconds += 5
    throughput.add(samples=7, units=7)
    throughput.read("images")
    clock.seconds += 2
    throughput.add(samples=1, units=4)
    metrics = throughput.read("images")
    assert metrics["perf/images_per_second"] == pytest.approx(2)
    assert metrics["perf/mfu"] == pytest.approx(1000 / (2 * 8000))
    assert metrics["perf/data_wait_fraction"] == 0


def test_a_peak_below_what_is_done_is_raised_to_it(clock, throughput):
    clock.seconds += 1
    throughput.add(samples=16, units=1)  # twice the peak that was measured
    assert throughput.read("images")["perf/mfu"] == 1
    clock.seconds += 1
    throughput.add(samples=4, units=1)
    assert throughput.read("images")["perf/mfu"] == pytest.approx(0.25)


def test_pauses_do_not_count_nested_or_not(clock, throughput):
    clock.seconds += 3
    with throughput.pause():
        clock.seconds += 50
        with throughput.pause():
            clock.seconds += 50
        clock.seconds += 50
        with throughput.waiting_for_data():
            clock.seconds += 50
    clock.seconds += 1
    throughput.add(samples=1, units=8)
    metrics = throughput.read("tokens")
    assert metrics["perf/tokens_per_second"] == pytest.approx(2)
    assert metrics["perf/data_wait_fraction"] == 0


def test_a_window_may_begin_and_end_within_pauses(clock, throughput):
    clock.seconds += 2
    throughput.add(samples=1, units=8)
    with throughput.pause():
        clock.seconds += 30
        assert throughput.read("tokens")["perf/tokens_per_second"] == pytest.approx(4)
        clock.seconds += 30
    clock.seconds += 4
    throughput.add(samples=1, units=8)
    assert throughput.read("tokens")["perf/tokens_per_second"] == pytest.approx(2)


def test_exceptions_pass_and_the_clock_goes_on(clock, throughput):
    def run_out():
        with throughput.waiting_for_data():
            clock.seconds += 1
            next(iter(()))

    def fail_to_save():
        with throughput.pause():
            clock.seconds += 10
            raise OSError("disk full")

    with pytest.raises(StopIteration):
        run_out()
    with pytest.raises(OSError, match="disk full"):
        fail_to_save()
    clock.seconds += 3
    throughput.add(samples=1, units=8)
    metrics = throughput.read("tokens")
    assert metrics["perf/tokens_per_second"] == pytest.approx(2)
    assert metrics["perf/data_wait_fraction"] == pytest.approx(0.25)


def test_reading_at_once_does_not_fail(throughput):
    assert set(throughput.read("tokens").values()) == {0.0}


def test_real_clock():
    throughput = Throughput(flops_per_sample=1.0, peak_flops_total=1.0)
    with throughput.waiting_for_data():
        time.sleep(0.05)
    with throughput.pause():
        time.sleep(0.5)
    throughput.add(samples=1, units=100)
    metrics = throughput.read("tokens")
    assert 200 < metrics["perf/tokens_per_second"] <= 2000
    assert 0.5 < metrics["perf/data_wait_fraction"] <= 1
