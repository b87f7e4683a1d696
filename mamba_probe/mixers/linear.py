"""The matrix by which a linear submodule acts, whatever it is made of."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["affine"]


def affine(
    linear: nn.Module, like: Tensor
) -> tuple[Float[Tensor, "out_feature in_feature"], Float[Tensor, " out_feature"] | None]:
    """Return W and b of a submodule that computes W u + b; b is None where it has none.

    torch's own Linear is read. Anything else that stands in its place, LoRA around it or quantised weights, is asked
    what it does to nothing and to the identity, in eval mode, and must do the same to a sum of the two.

    Arguments:
        linear: with `in_features`.
        like: a tensor of the device and dtype that it is to be asked in.

    Raises:
        ValueError: it is not linear, such as one that quantises what it is given.

    >>> wrapped = nn.Sequential(nn.Linear(3, 2))
    >>> wrapped.in_features = 3
    >>> W, b = affine(wrapped, torch.ones(1))
    >>> torch.allclose(W, wrapped[0].weight), torch.allclose(b, wrapped[0].bias)
    (True, True)
    """
    if type(linear) is nn.Linear and linear.weight.device.type != "meta":
        return linear.weight, linear.bias
    n_in, training = int(linear.in_features), linear.training  # type: ignore[arg-type]
    one = torch.eye(n_in, device=like.device, dtype=like.dtype)
    mixed = torch.randn((4, n_in), generator=torch.Generator().manual_seed(0)).to(one)
    linear.eval()
    try:
        with torch.no_grad():
            b, columns, found = linear(torch.zeros_like(one[0])), linear(one), linear(mixed)
    finally:
        linear.train(training)
    W = (columns - b).T
    apart = (found.double() - mixed.double() @ W.double().T - b.double()).abs().max()
    if not apart <= 8 * torch.finfo(like.dtype).eps * n_in**0.5 * (found.abs().max() + columns.abs().max()):
        raise ValueError(
            f"a {type(linear).__name__} does not act by a matrix: what it does to a sum differs from the sum by"
            f" {apart.item():.1e}. Kernels that quantise activations do this: record as usual, and read the weights of"
            " an unquantised copy"
        )
    return W, b if bool(b.any()) else None
