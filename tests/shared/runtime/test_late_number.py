import torch

from shared.runtime.late_number import LateNumber


def test_the_number_is_that_of_when_it_was_made() -> None:
    value = torch.tensor([2.0])
    number = LateNumber(value)
    value.add_(1)
    assert (number.read(), number.read()) == (2.0, 2.0)
    assert LateNumber(torch.tensor(float("inf"), requires_grad=True)).read() == float("inf")
