"""How much one token's mixer input moves another token's mixer output: exact derivatives, selection moving with them.

J_{t,s} = d out_t / d u_s of one layer's mixer, (model, model), at the inputs the model gave it. Unlike a kernel made
from a trace, it follows the paths through delta, B, C, the convolution and the gate. Source: ours.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from mamba_probe import provenance
from mamba_probe.arguments import array, whole, wholes
from mamba_probe.inputs import ModelInput, checked_input
from mamba_probe.mixers import MixerAdapter
from mamba_probe.trace.contract import unknown_name

__all__ = ["jacobian"]

Mixer = Callable[[Tensor], Tensor]


def jacobian(
    probe: Any, inputs: Any = None, attention_mask: Any = None, *, layer: int,
    query_tokens: Sequence[int] | None = None, source_tokens: Sequence[int] | None = None, read_out: Any = None,
    direction: Any = None, n_probes: int | None = None, seed: int = 0,
) -> xr.Dataset:  # fmt: skip
    r"""Derivatives of a mixer's output by its input, token by token, selection moving with them.

    $J_{t,s} = \partial\, \mathrm{out}_t / \partial u_s$ of one layer, at the inputs that the model gives it.

    Args:
        probe: an attached probe.
        inputs, attention_mask: as in `record`.
        layer: the model's own layer number.
        query_tokens: positions t among a row's valid tokens: which inputs move them (one backward pass a query
            and output).
        source_tokens: positions s: which outputs they move (one forward-mode pass a source and direction). Give
            one of the two.
        read_out: (kernel, model) rows that read the output; None: every feature of it.
        direction: (model,) along which the input moves; None: all features, as the norm over them.
        n_probes: with source_tokens and no direction: estimate the Frobenius norm from this many random sign
            vectors, sum |J v|^2 / n (unbiased in the square); None: exact, one pass a feature.
        seed: of the probes.

    Returns:
        `jacobian` over (batch, query_token, kernel, token), or (batch, source_token, token) as a norm >= 0; NaN
        at padding.

    Raises:
        ValueError: both or neither kind of token, a position that not every row has, an unknown layer, wrong
            shapes, or source_tokens with the backend triton, which has no forward-mode derivative.
    """
    probe._check_unedited("jacobian")
    if any(tap.listener is not None for tap in probe._taps.values()):
        raise ValueError("jacobian runs the model, and a recording is open on this probe: leave it first")
    if whole("layer", layer) not in probe._taps:
        raise unknown_name("layer", layer, [str(known) for known in probe.layers])
    if probe.backend == "triton" and source_tokens is not None:
        raise ValueError(
            "the triton scan has no forward-mode derivative, which source_tokens need: ask for query_tokens, or "
            'attach with backend="cpu", on any device'
        )
    adapter = next(adapter for adapter in probe._adapters if adapter.layer == layer)
    given = checked_input(probe.model, adapter.sizes.width, inputs, attention_mask, None, None)
    return _measured(
        probe.model, adapter, given, query_tokens=query_tokens, source_tokens=source_tokens, read_out=read_out,
        direction=direction, n_probes=n_probes, seed=seed,
    )  # fmt: skip


def _measured(
    model: nn.Module, adapter: MixerAdapter, given: ModelInput, *, query_tokens: Sequence[int] | None,
    source_tokens: Sequence[int] | None, read_out: Any, direction: Any, n_probes: int | None, seed: int,
) -> xr.Dataset:  # fmt: skip
    """See `jacobian`."""
    if (query_tokens is None) == (source_tokens is None):
        raise ValueError("pass either query_tokens (what moved them) or source_tokens (what they move), and not both")
    seed = whole("seed", seed)
    if n_probes is not None and (source_tokens is None or direction is not None):
        raise ValueError(f"n_probes ({n_probes!r} came) goes with source_tokens and no direction")
    n_probes = None if n_probes is None else whole("n_probes", n_probes, 1)
    hidden, mask = _mixer_input(model, adapter, given)
    valid = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
    asked, dim = (query_tokens, "query_token") if query_tokens is not None else (source_tokens, "source_token")
    index = _index(valid, asked, dim)
    rows = None if read_out is None else _matrix(read_out, "read_out", hidden)
    along = None if direction is None else _matrix(array("direction", direction)[None], "direction", hidden).flatten()

    def mixer(u: Tensor) -> Tensor:
        return adapter.given(adapter.mixer(adapter.taken(u), **adapter.masks(mask)))

    if query_tokens is not None:
        found = _pulled(mixer, hidden, index, rows, along)
        entry = (("batch", dim, "kernel", "token"), found)
        what = "d (read_out . out_t) / d u_s" + (" along direction" if direction is not None else ", norm over model")
    else:
        found = _pushed(mixer, hidden, index, rows, along, n_probes, seed)
        entry = (("batch", dim, "token"), found)
        what = "norm of d out_t / d u_s" + (" along direction" if direction is not None else ", Frobenius")
    found[np.broadcast_to(~valid.numpy().reshape(len(valid), *[1] * (found.ndim - 2), -1), found.shape)] = np.nan
    attrs = provenance.of_model(model, "jacobian") | {
        "layer": adapter.layer,
        "estimator": f"{what}; automatic differentiation in {str(hidden.dtype).removeprefix('torch.')}",
        "n_probes": -1 if n_probes is None else n_probes,
        "seed": seed,
    }
    position = np.where(valid, np.cumsum(valid.numpy(), axis=1) - 1, -1)
    coords = {dim: np.asarray(asked), "valid": (("batch", "token"), valid.numpy())}
    coords["position"] = (("batch", "token"), position)
    return xr.Dataset({"jacobian": entry}, coords, attrs)


def _mixer_input(model: nn.Module, adapter: MixerAdapter, given: ModelInput) -> tuple[Tensor, Tensor | None]:
    """What the layer's mixer takes when the model runs: hidden states (batch, token, model), and the mask."""
    caught: list[tuple[Tensor, Tensor | None]] = []

    def catch(_mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0] if args else kwargs[adapter.takes], kwargs.get("attention_mask")))

    handle = adapter.mixer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            (keywords,) = given.pieces(None)
            model(**keywords)
    finally:
        handle.remove()
    hidden, mask = caught[-1]
    return adapter.taken(hidden).detach(), mask


def _index(valid: Tensor, asked: Sequence[int] | None, name: str) -> Int[np.ndarray, "batch asked"]:
    """Token of each asked position in each row; positions count valid tokens."""
    wanted = np.array(wholes(f"{name}s", asked), dtype=np.int64)
    counts = valid.sum(1).numpy()
    if not wanted.size:
        raise ValueError(f"{name}s is a non-empty list of positions; got {asked!r}")
    if wanted.min() < 0 or wanted.max() >= counts.min():
        raise ValueError(f"{name}s must lie in 0 .. {counts.min() - 1}, the shortest row's positions; got {asked!r}")
    return np.stack([np.flatnonzero(row)[wanted] for row in valid.numpy()])


def _matrix(given: Any, name: str, hidden: Tensor) -> Tensor:
    matrix = torch.as_tensor(array(name, given)).to(hidden)
    if matrix.ndim != 2 or matrix.shape[1] != hidden.shape[2] or not torch.isfinite(matrix).all():
        raise ValueError(
            f"{name} needs finite values over model = {hidden.shape[2]} features; got shape {tuple(matrix.shape)}"
        )
    return matrix


def _pulled(
    mixer: Mixer, hidden: Tensor, index: Int[np.ndarray, "batch query"], rows: Tensor | None, along: Tensor | None
) -> Float[np.ndarray, "batch query kernel token"]:
    """One backward pass a query and output: what each token's input does to it."""
    rows = torch.eye(hidden.shape[2], dtype=hidden.dtype, device=hidden.device) if rows is None else rows
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        every, u = torch.arange(len(hidden)), hidden.clone().requires_grad_()
        out = mixer(u)
        for at in index.T:
            read = out[every, at] @ rows.clone().T
            for kernel in range(len(rows)):
                (slope,) = torch.autograd.grad(read[:, kernel].sum(), u, retain_graph=True)
                found.append(slope.norm(dim=-1) if along is None else slope @ along)
    stacked = torch.stack(found, dim=1).unflatten(1, (index.shape[1], len(rows)))
    return stacked.detach().double().cpu().numpy()


def _pushed(
    mixer: Mixer, hidden: Tensor, index: Int[np.ndarray, "batch source"], rows: Tensor | None, along: Tensor | None,
    n_probes: int | None, seed: int,
) -> Float[np.ndarray, "batch source token"]:  # fmt: skip
    """One forward-mode pass a source and direction: how far each output moves."""
    every, found = torch.arange(len(hidden)), []
    for at in index.T:
        squares = []
        for vector in _directions(hidden, along, n_probes, seed):
            tangent = torch.zeros_like(hidden)
            tangent[every, at] = vector
            moved = torch.func.jvp(mixer, (hidden,), (tangent,))[1]
            moved = moved if rows is None else moved @ rows.T
            squares.append(moved.detach().double().square().sum(-1))
        total = torch.stack(squares).sum(0) / (len(squares) if n_probes is not None and along is None else 1)
        found.append(total.sqrt())
    return torch.stack(found, dim=1).cpu().numpy()


def _directions(hidden: Tensor, along: Tensor | None, n_probes: int | None, seed: int) -> Iterator[Tensor]:
    """The direction given; else every feature; else `n_probes` vectors of +1 and -1, whose mean square is exact."""
    if along is not None:
        yield along
    elif n_probes is None:
        yield from torch.eye(hidden.shape[2], dtype=hidden.dtype, device=hidden.device)
    else:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n_probes):
            signs = torch.randint(0, 2, (hidden.shape[2],), generator=generator) * 2 - 1
            yield signs.to(hidden)
