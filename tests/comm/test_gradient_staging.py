"""Gradients copied to the host as the backward pass makes them; on the CPU here, where only the stream is missing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvd_hetero.comm.flat_params import FlatState, concat
from hvd_hetero.comm.gradient_staging import HostGradients


class TwoHeads(nn.Module):
    """A model of which a part has no part in the loss, and another a type of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, inputs: Tensor, head: int) -> Tensor:
        return self.heads[head](self.body(inputs)).double() * self.wide


def test_the_copy_follows_every_backward_epoch() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    gradients = FlatState(model).flat_gradients()
    assert len(gradients) == 2, "a vector a type"
    host = HostGradients(model.parameters(), gradients)
    for head in (0, 1, 0):
        for gradient in gradients:
            gradient.zero_()
        model(torch.randn(5, 4), head).square().sum().backward()
        taken = host.synchronize()
        assert torch.equal(taken, concat(gradients))
        unused = model.heads[1 - head].weight.grad
        assert unused is not None and not unused.any(), "what the other head had left there is gone"
    assert host.synchronize().data_ptr() != gradients[0].data_ptr(), "a copy, and no view"
