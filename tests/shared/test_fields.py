"""What fields say against each other, and what each may be."""

from dataclasses import dataclass

import pytest

from shared.command_line import UsageError
from shared.fields import RunControl, check_run_control

TOKEN = "hf_" + "a1B2" * 9


@dataclass(frozen=True, kw_only=True)
class Config(RunControl):
    """Fields of a method."""

    global_batch_size: int = 8
    max_steps: int = 5
    max_grad_norm: float = 1.0
    data: str = "sample"
    """Where the text is."""


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"log_every": 0}, "log_every: 0: expected at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: 0: expected at least 1"),
        ({"seed": -1}, "seed: -1: expected at least 0"),
        ({"timeout_minutes": 0}, "timeout_minutes: 0: expected more than 0"),
        ({"push_every": 5}, "push_every: 5: expected push_to_hub to be set as well"),
        ({"data": f"x{TOKEN}"}, "data: 'xhf_***': expected no access token; use `hf auth login` or HF_TOKEN"),
    ],
)
def test_check_run_control(fields, expected):
    with pytest.raises(UsageError) as caught:
        check_run_control(Config(**fields))
    assert str(caught.value) == expected


def test_check_run_control_lets_the_defaults_and_a_push_pass():
    check_run_control(Config())
    check_run_control(Config(push_to_hub="me/x", push_every=5, data="hf-internal-testing/tiny", timeout_minutes=0.1))
