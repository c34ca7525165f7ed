from types import SimpleNamespace

import pytest
import torch

from shared.runtime.precision import autocast, type_of_products


@pytest.mark.parametrize(("word", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_modules_compute_in_the_type_of_the_launcher_s_word(word: str, dtype: torch.dtype) -> None:
    accelerator = SimpleNamespace(mixed_precision=word)
    assert type_of_products(accelerator) == dtype
    with autocast(accelerator, "cpu"):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
