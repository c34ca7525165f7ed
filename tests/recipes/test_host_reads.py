"""Between two log lines no update of any page makes the host wait for the device."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.run.training_run import Run
from shared.runtime.late_number import LateNumber
from tests.host_reads import HostReads
from tests.recipes.pages import PAGES
from tests.recipes.runs import run

# Reads that are not ours, in a micro-batch: transformers looks whether a row holds padding or several documents, but in
# compiled models; torch's one_hot looks at the labels, but on GPUs.
OF_LIBRARIES = {"gpt": 1, "gpt_finetune": 1, "bert": 1, "bert_finetune": 1, "resnet_rsb": 2}


@pytest.fixture(params=[pytest.param(name, marks=() if name == "resnet" else pytest.mark.slow) for name in PAGES])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Any]:
    """Name, module and configuration of a page; the fourth update alone is logged."""
    tests, data = PAGES[request.param]
    module = request.getfixturevalue(request.param)
    fields: dict[str, Any] = {"max_steps": 4, "warmup_steps": 1, "log_every": 4, "eval_every": 0, "save_every": 0}
    cfg = tests.config_of(module, *map(request.getfixturevalue, data), tmp_path / "run", **fields)
    return request.param, module, cfg


def wrapped(function: Callable[..., Any], block: Callable[[], contextlib.AbstractContextManager[None]]) -> Any:
    """The function, called in a block."""

    def call(*values: Any, **options: Any) -> Any:
        with block():
            return function(*values, **options)

    return call


def test_an_update_reads_nothing_from_the_device(page: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (name, module, cfg), numbers = page, []

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        with HostReads() as reads:
            yield
        numbers.append(reads.number)

    monkeypatch.setattr(module, "train_update", wrapped(module.train_update, counted))
    monkeypatch.setattr(Run, "count_update", wrapped(Run.count_update, counted))
    monkeypatch.setattr(LateNumber, "read", lambda number: number._here.numpy().item())  # it is on the host
    run(module, cfg)
    assert numbers == [OF_LIBRARIES.get(name, 0), 0] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_an_update_does_not_wait_for_the_gpu(page: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch itself tells each synchronisation, also those of copies from memory that is not pinned."""
    (name, module, cfg), numbers = page, []

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield
            torch.cuda.set_sync_debug_mode("default")
        numbers.append(sum("synchroniz" in str(warning.message) for warning in caught))

    monkeypatch.setattr(module, "train_update", wrapped(module.train_update, counted))
    monkeypatch.setattr(Run, "count_update", wrapped(Run.count_update, counted))
    run(module, cfg)
    expected = 0 if name == "resnet_rsb" else OF_LIBRARIES.get(name, 0)
    assert numbers[2:6] == [expected, 0] * 2  # the first begins libraries, the last is logged
