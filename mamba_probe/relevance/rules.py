"""The rules of MambaLRP: parts of a model keep their values and get the gradients by which relevance is conserved.

| part | goes on as | so that gradient x input |
|---|---|---|
| selection | delta, A, B and C of the scan held: y = alpha x + D x is linear in x | of x is that of y |
| SiLU | a sigma(a), sigma(a) held | of a is that of silu(a) |
| gate y g | (y [g] + [y] g) / 2, [.] held | is shared half and half |
| norm | w u [r], r = 1 / rms(u) held | of u is that of the output |

Source: Jafari et al. 2024, arXiv 2406.07592. Mamba-2's gated norm w y g [r] is the last two together (ours).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mamba_probe.kernels.scan import ScanResult, selective_scan
from mamba_probe.mixers import MixerAdapter, Tap

__all__ = ["HEAD", "Biases", "MambaLRP", "following"]

HEAD = "lm_head"
"""The site of the head's bias."""
AGREES = 1e-5
"""How far a norm by its rule may be from the library's, which rounds to fp32 within, in units of the largest."""


class Biases:
    """Where a bias is added, (row by row) the gradient there: its relevance is bias x gradient."""

    def __init__(self) -> None:
        self.zeros: dict[str, Tensor] = {}
        self._bias: dict[str, Tensor] = {}

    def met(self, site: str, out: Tensor, bias: Tensor | None, axis: int = -1) -> Tensor:
        """`out`, which holds `bias` along `axis`, with a zero added by which the gradient is taken."""
        if bias is None:
            return out
        shape = [len(out), *[1] * (out.ndim - 1)]
        shape[axis] = len(bias)
        self.zeros[site] = torch.zeros(shape, dtype=out.dtype, device=out.device, requires_grad=True)
        self._bias[site] = bias.detach()
        return out + self.zeros[site]

    def relevance(self, site: str, gradient: Tensor) -> Tensor:
        """(batch,): of the bias at `site`, of all tokens."""
        return (gradient.flatten(1).double() * self._bias[site].double()).sum(1)


class MambaLRP:
    """The rules of one layer: `mamba_probe.mixers.tap.Rules`."""

    def __init__(self, adapter: MixerAdapter, biases: Biases):
        self.adapter, self.biases = adapter, biases

    def scan(
        self, x: Tensor, z: Tensor | None, selection: Mapping[str, Tensor | None], fixed: Mapping[str, Any]
    ) -> ScanResult:
        """The scan with its selection held, and the gate's product shared half and half."""
        held: dict[str, Any] = {name: None if each is None else each.detach() for name, each in selection.items()}
        result = selective_scan(x, **held, **fixed)
        return result if z is None else result._replace(y=shared(result.y, silu(z)))

    def conv(self, original: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution, whose bias is followed, and SiLU by its rule.

        Raises:
            ValueError: another activation.
        """
        activation = kwargs.pop("activation", None)
        if activation not in ("silu", "swish"):
            raise ValueError(f"relevance: expected activation 'silu', got {activation!r}, which has no rule here")
        before = original(hidden, *args, activation=None, **kwargs)
        return silu(self.biases.met(f"layer {self.adapter.layer} conv1d", before, self.adapter.mixer.conv1d.bias, 1))

    def gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """Mamba-2's norm(y silu(z)), or the gate alone where its norm has no weight."""
        norm, product = self.adapter.mixer.norm, shared(y, silu(z))
        if getattr(norm, "weight", None) is None:
            return product
        grouped = product.unflatten(-1, (self.adapter.sizes.n_groups, -1))
        return normed(grouped, norm.variance_epsilon).flatten(-2) * norm.weight


def silu(before: Tensor) -> Tensor:
    """SiLU as a line through 0."""
    return before * torch.sigmoid(before).detach()


def shared(y: Tensor, gate: Tensor) -> Tensor:
    """y gate, its gradient x input half y's and half the gate's."""
    return 0.5 * (y * gate.detach() + y.detach() * gate)


def normed(hidden: Tensor, epsilon: float) -> Tensor:
    """`hidden` over its root mean square, which is held."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon).detach()


@contextmanager
def following(probe: Any, rules: str) -> Iterator[tuple[Biases, list[Tensor]]]:
    """The rules are on in the probe's model; "gradient" changes nothing.

    Yields:
        The biases met, none for "gradient"; and what the head gave, a tensor a forward.
    """
    biases, head, logits = Biases(), probe.model.get_output_embeddings(), []
    with ExitStack() as block:
        if rules == "mambalrp":
            block.callback(head.register_forward_hook(_adding(biases, HEAD, head.bias)).remove)
            for norm, name in _norms(probe.model):
                block.callback(norm.register_forward_hook(_norm(name)).remove)
            for adapter in probe._adapters:
                _follow(block, adapter, probe._taps[adapter.layer], biases)

        def given(_head: nn.Module, _args: Any, out: Tensor) -> None:
            logits.append(out)

        block.callback(head.register_forward_hook(given).remove)
        yield biases, logits


def _norms(model: Any) -> Iterator[tuple[nn.Module, str]]:
    for number, layer in enumerate(model.backbone.layers):
        yield layer.norm, f"the norm before block {number}"
    yield model.backbone.norm_f, "the last norm"


def _follow(block: ExitStack, adapter: MixerAdapter, tap: Tap, biases: Biases) -> None:
    """Put the rules of one layer on."""
    rules = MambaLRP(adapter, biases)
    tap.rules = rules
    block.callback(setattr, tap, "rules", None)
    for name in ("in_proj", "out_proj"):
        added = _adding(biases, f"layer {adapter.layer} {name}", adapter.linear(name)[1])
        block.callback(getattr(adapter.mixer, name).register_forward_hook(added).remove)
    if adapter.family == "mamba2":

        def gated(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return _agreed(rules.gated_norm(*args), out, f"the gated norm of layer {adapter.layer}")

        block.callback(adapter.mixer.norm.register_forward_hook(gated).remove)


def _adding(biases: Biases, site: str, bias: Tensor | None) -> Callable[..., Tensor]:
    def added(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return biases.met(site, out, bias)

    return added


def _norm(name: str) -> Callable[..., Tensor]:
    def ruled(norm: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        epsilon: Any = norm.eps if isinstance(norm, nn.RMSNorm) else norm.variance_epsilon
        return _agreed(normed(args[0], epsilon) * norm.weight, out, name)

    return ruled


def _agreed(found: Tensor, native: Tensor, name: str) -> Tensor:
    """`found`, which must have the value that the module gave, but for what that rounded."""
    apart = ((found - native).abs().max() / native.abs().max().clamp_min(torch.finfo(native.dtype).tiny)).item()
    if not apart <= AGREES:
        raise ValueError(
            f"relevance: {name} by its rule differs from what the model computes by {apart:.1e} of the largest value:"
            " it is another norm than the one that the rule is for, and its relevance would not be the model's"
        )
    return found
