"""A trace of updates 3 to 5 appears by itself."""

import json

import torch

from shared.performance.profiling import trace_updates


def test_three_updates_are_traced(tmp_path):
    profiler = trace_updates(tmp_path / "profile")
    for _ in range(5):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.step()
    [path] = (tmp_path / "profile").iterdir()
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == 3
    profiler.stop()
    assert len(list((tmp_path / "profile").iterdir())) == 1


def test_shorter_runs_leave_no_trace_and_no_error(tmp_path):
    profiler = trace_updates(tmp_path / "profile")
    profiler.step()
    profiler.stop()
    assert not (tmp_path / "profile").exists()
