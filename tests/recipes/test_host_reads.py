"""Between two log lines no update of any page makes the host wait for the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.run.training_run import Run
from shared.runtime.late_number import LateNumber
from tests.host_reads import HostReads
from tests.recipes import (
    test_bert_finetune,
    test_bert_pretrain,
    test_gpt_finetune,
    test_gpt_pretrain,
    test_resnet_finetune,
    test_resnet_pretrain,
    test_resnet_pretrain_rsb,
    test_text_to_image_pretrain,
    test_text_to_image_pretrain_transformer,
    test_text_to_image_train_vae,
)
from tests.recipes.runs import run

# Of the module that tests a page, whose `config_of` takes them: the page's fixture, then those of its data.
PAGES: dict[str, tuple[Any, list[str]]] = {
    "gpt": (test_gpt_pretrain, ["corpus"]),
    "gpt_finetune": (test_gpt_finetune, ["causal", "messages"]),
    "bert": (test_bert_pretrain, ["sentences_file"]),
    "bert_finetune": (test_bert_finetune, ["encoder", "labelled"]),
    "resnet": (test_resnet_pretrain, ["shapes"]),
    "resnet_rsb": (test_resnet_pretrain_rsb, ["shapes"]),
    "resnet_finetune": (test_resnet_finetune, ["classifier", "shapes"]),
    "vae": (test_text_to_image_train_vae, ["shapes"]),
    "pretrain": (test_text_to_image_pretrain, ["latents", "tiny_vae"]),
    "pretrain_transformer": (test_text_to_image_pretrain_transformer, ["latents", "tiny_vae"]),
}
# Reads that are not ours, in a micro-batch: transformers looks whether a row holds padding or several documents, but in
# compiled models; torch's one_hot looks at the labels, but on GPUs.
OF_LIBRARIES = {"gpt": 1, "gpt_finetune": 1, "bert": 1, "bert_finetune": 1, "resnet_rsb": 2}
causal, talks = test_gpt_finetune.causal, test_gpt_finetune.talks


@pytest.fixture
def messages(talks: Path) -> Path:
    """Conversations."""
    return talks / "messages"


@pytest.mark.parametrize("name", PAGES)
def test_an_update_reads_nothing_from_the_device(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests, data = PAGES[name]
    page, numbers = request.getfixturevalue(name), []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            with HostReads() as reads:
                result = function(*values, **options)
            numbers.append(reads.number)
            return result

        return call

    fields: dict[str, Any] = {"max_steps": 4, "warmup_steps": 1, "log_every": 4, "eval_every": 0, "save_every": 0}
    cfg = tests.config_of(page, *map(request.getfixturevalue, data), tmp_path / "run", **fields)
    monkeypatch.setattr(page, "train_update", counted(page.train_update))
    monkeypatch.setattr(Run, "count_update", counted(Run.count_update))
    monkeypatch.setattr(LateNumber, "read", lambda number: number._here.numpy().item())  # it is on the host
    run(page, cfg)
    assert numbers == [OF_LIBRARIES.get(name, 0), 0] * 4
