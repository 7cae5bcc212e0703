"""autopar::hub is an identity that copies."""

import torch

import autopar.ops  # noqa: F401


def test_hub_copies_and_passes_gradients() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = torch.ops.autopar.hub(x)
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    torch.library.opcheck(torch.ops.autopar.hub.default, (x,))
