"""A number that a device computes, read on the host an update later, so that neither waits for the other."""

import torch


class LateNumber:
    """A number on its way to the host.

    Args:
        number: of one element, on any device. It is copied once the device has done what it was told so far.
    """

    def __init__(self, number: torch.Tensor) -> None:
        # From a GPU into pinned memory; copied also on a CPU, where it could be changed before it is read.
        self._here = number.detach().to("cpu", non_blocking=True, copy=True)
        self._copied = None
        if number.device.type != "cpu":
            self._copied = torch.Event(number.device)
            self._copied.record()

    def read(self) -> float:
        """The number; it waits for what the device was told before this was made, and for nothing after it."""
        if self._copied:
            self._copied.synchronize()
        return float(self._here)
