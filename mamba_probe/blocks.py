"""Our own Mamba-1, Mamba-2 and S4D blocks, and a language model of them, for S4D, constructions and training.

Weights have upstream's names and layout: those of state-spaces/mamba (and of transformers, whose state dicts load here
and the other way round), and for S4D those of state-spaces/s4's `s4d.py` inside a Mamba-1 block. For input u:

    Mamba-1   [x, z] = in_proj u             x = silu(conv x)     [dt, B, C] = x_proj x   delta = softplus(dt_proj dt)
    Mamba-2   [z, x, B, C, dt] = in_proj u   x, B, C = silu(conv)                         delta = softplus(dt + bias)
    S4D       [x, z] = in_proj u             x = silu(conv x)     B = 1, C, delta constant; complex A, zoh

    h = A_bar h + B_bar x;  y = C h + D x;  out = out_proj(y silu(z)), with Mamba-2's norm before out_proj
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mamba_probe.kernels.scan import selective_scan

__all__ = ["MODEL_TYPE", "LanguageModel", "Logits", "Mamba2Block", "MambaBlock", "S4DBlock", "build", "config_of"]

MODEL_TYPE = "mamba_probe"
EPSILON = 1e-5  # of the RMS norms
MOST = 1 << 24  # of any size: products of two are whole numbers still
STEP_SIZES = (1e-3, 0.1)  # least and greatest initial delta


class MambaBlock(nn.Module):
    """A Mamba-1 block (S6). Source: state-spaces/mamba, arXiv 2312.00752.

    Args:
        d_model: features in and out.
        d_inner: channels, 2 d_model if None.
        d_state: states a channel.
        d_conv: taps of the convolution.
        dt_rank: rank of delta's projection, d_model / 16 rounded up if None.
        backend: of the scan, when no probe is attached.
        layer_idx: the block's number in its model.

    Example:
        >>> MambaBlock(4)(torch.ones(2, 5, 4)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(
        self, d_model: int, *, d_inner: int | None = None, d_state: int = 16, d_conv: int = 4,
        dt_rank: int | None = None, backend: str = "auto", layer_idx: int = 0,
    ):  # fmt: skip
        super().__init__()
        d_inner = 2 * d_model if d_inner is None else d_inner
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.sizes = _checked(d_model=d_model, d_inner=d_inner, d_state=d_state, d_conv=d_conv, dt_rank=dt_rank)
        self.backend, self.layer_idx = backend, layer_idx
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(dt_rank**-0.5), dt_rank**-0.5)
            self.dt_proj.bias.copy_(_inverse_softplus(_step_sizes(d_inner)))

    def forward(
        self,
        hidden_states: Float[Tensor, "batch token model"],
        attention_mask: Int[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch token model"]:
        """Return the block's output; padding (0 in `attention_mask`) neither writes nor is convolved."""
        x, z = self.in_proj(_masked(hidden_states, attention_mask)).chunk(2, -1)
        x = causal_conv1d_fn(x.transpose(1, 2), self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        x = _masked(x.transpose(1, 2), attention_mask)
        d_state = self.sizes["d_state"]
        dt, B, C = self.x_proj(x).split([self.sizes["dt_rank"], d_state, d_state], -1)
        y = selective_scan(
            x[..., None], F.linear(dt, self.dt_proj.weight), -torch.exp(_wide(self.A_log)), B[:, :, None],
            C[:, :, None], self.D, z[..., None], delta_bias=self.dt_proj.bias, delta_softplus=True,
            backend=self.backend,
        ).y  # fmt: skip
        return self.out_proj(y[..., 0])


class Mamba2Block(nn.Module):
    """A Mamba-2 block (SSD). Source: state-spaces/mamba, arXiv 2405.21060.

    Args:
        d_model: features in and out.
        n_heads: heads, each with one A and one delta a token.
        d_inner: channels of all heads, 2 d_model if None.
        d_state: states a channel.
        d_conv: taps of the convolution.
        n_groups: groups of heads that share B and C, and of channels that the norm takes together.
        gated_norm: RMS norm after the gate, as upstream; without it the gate acts alone, and magnitudes survive.
        backend, layer_idx: as in `MambaBlock`.

    Example:
        >>> Mamba2Block(4, n_heads=2, d_state=8)(torch.ones(2, 5, 4)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(
        self, d_model: int, *, n_heads: int, d_inner: int | None = None, d_state: int = 128, d_conv: int = 4,
        n_groups: int = 1, gated_norm: bool = True, backend: str = "auto", layer_idx: int = 0,
    ):  # fmt: skip
        super().__init__()
        d_inner = 2 * d_model if d_inner is None else d_inner
        counts = _checked(d_model=d_model, n_heads=n_heads, d_inner=d_inner, d_state=d_state, d_conv=d_conv)
        self.sizes = counts | _checked(n_groups=n_groups) | {"gated_norm": gated_norm}
        if d_inner % n_heads or n_heads % n_groups:
            came = f"d_inner = {d_inner}, n_heads = {n_heads}, n_groups = {n_groups}"
            raise ValueError(f"Mamba2Block: d_inner must be a multiple of n_heads, which of n_groups; got {came}")
        self.backend, self.layer_idx = backend, layer_idx
        convolved = d_inner + 2 * n_groups * d_state
        self.in_proj = nn.Linear(d_model, d_inner + convolved + n_heads, bias=False)
        self.conv1d = nn.Conv1d(convolved, convolved, d_conv, groups=convolved)
        self.dt_bias = nn.Parameter(_inverse_softplus(_step_sizes(n_heads)))
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(n_heads))
        self.norm = GatedNorm(d_inner, n_groups) if gated_norm else Gate()
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch token model"],
        attention_mask: Int[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch token model"]:
        """Return the block's output; padding (0 in `attention_mask`) neither writes nor is convolved."""
        d_inner, n_heads, n_groups = (self.sizes[name] for name in ("d_inner", "n_heads", "n_groups"))
        grouped = n_groups * self.sizes["d_state"]
        projected = self.in_proj(_masked(hidden_states, attention_mask))
        z, xBC, dt = projected.split([d_inner, d_inner + 2 * grouped, n_heads], -1)
        xBC = causal_conv1d_fn(xBC.transpose(1, 2), self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        x, B, C = _masked(xBC.transpose(1, 2), attention_mask).split([d_inner, grouped, grouped], -1)
        y = selective_scan(
            x.unflatten(-1, (n_heads, -1)), dt, -torch.exp(_wide(self.A_log)), B.unflatten(-1, (n_groups, -1)),
            C.unflatten(-1, (n_groups, -1)), self.D, delta_bias=self.dt_bias, delta_softplus=True,
            backend=self.backend,
        ).y  # fmt: skip
        return self.out_proj(self.norm(y.flatten(2), z))


class S4DBlock(nn.Module):
    """A Mamba-1 block with a time-invariant mixer: S4D in the place of S6.

    A state stands for itself and its conjugate: y = 2 Re(C h) + D x. Source: state-spaces/s4, `s4d.py`, arXiv
    2206.11893 (kernel, initialisation S4D-Lin); the block around it is Mamba-1's.

    Args:
        d_model: features in and out.
        d_inner: channels, 2 d_model if None.
        d_state: conjugate pairs a channel.
        d_conv: taps of the convolution.
        backend: of the scan, when no probe is attached: "cpu" (plain torch, on any device), "naive", or "convolution"
            with the kernel of all lags at once, by FFT: as S4D is trained, on a GPU many times as fast. The Triton
            scan has no complex A yet.
        layer_idx: the block's number in its model.

    Example:
        >>> S4DBlock(4)(torch.ones(2, 5, 4)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(
        self, d_model: int, *, d_inner: int | None = None, d_state: int = 32, d_conv: int = 4,
        backend: str = "cpu", layer_idx: int = 0,
    ):  # fmt: skip
        super().__init__()
        d_inner = 2 * d_model if d_inner is None else d_inner
        self.sizes = _checked(d_model=d_model, d_inner=d_inner, d_state=d_state, d_conv=d_conv)
        self.backend, self.layer_idx = backend, layer_idx
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)
        self.kernel = S4DKernel(d_inner, d_state)
        self.D = nn.Parameter(torch.randn(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch token model"],
        attention_mask: Int[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch token model"]:
        """Return the block's output; padding (0 in `attention_mask`) neither writes nor is convolved."""
        x, z = self.in_proj(_masked(hidden_states, attention_mask)).chunk(2, -1)
        x = causal_conv1d_fn(x.transpose(1, 2), self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")
        x = _masked(x.transpose(1, 2), attention_mask)
        if self.backend == "convolution":
            return self.out_proj(((self._convolved(x) + self.D * x) * F.silu(z)).to(x.dtype))
        delta, A, B, C = self.kernel()
        y = selective_scan(
            x[..., None], delta.expand(x.shape), A, B, C, self.D, z[..., None],
            discretization="zoh", backend=self.backend,
        ).y  # fmt: skip
        return self.out_proj(y[..., 0])

    def _convolved(self, x: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token channel"]:
        """C h of every token: x convolved with the kernel, zeros behind both so that nothing comes around."""
        n_token = x.shape[1]
        signal, kernel = (torch.fft.rfft(each, n=2 * n_token) for each in (_wide(x).mT, self.kernel.lags(n_token)))
        return torch.fft.irfft(signal * kernel, n=2 * n_token)[..., :n_token].mT


class S4DKernel(nn.Module):
    """The parameters of S4D as `s4d.py` stores them: C as real pairs, the logarithms of delta and of -Re A."""

    def __init__(self, channels: int, states: int):
        super().__init__()
        self.C = nn.Parameter(torch.view_as_real(torch.randn(channels, states, dtype=torch.cfloat)).contiguous())
        self.log_dt = nn.Parameter(_step_sizes(channels).log())
        self.log_A_real = nn.Parameter(torch.full((channels, states), math.log(0.5)))
        self.A_imag = nn.Parameter((math.pi * torch.arange(states)).repeat(channels, 1))

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return delta (channel,) and A, B, C (channel, state), as the scan takes them; B is one."""
        A = torch.complex(-torch.exp(_wide(self.log_A_real)), _wide(self.A_imag))
        return torch.exp(_wide(self.log_dt)), A, torch.ones_like(A), torch.view_as_complex(_wide(self.C))

    def lags(self, count: int) -> Float[Tensor, "channel lag"]:
        """Return the convolution's kernel, 2 Re sum_n C (exp(delta A) - 1) / A exp(lag delta A), at the first lags."""
        delta, A, _, C = self()
        step = delta[:, None] * A
        powers = torch.exp(step[..., None] * torch.arange(count, device=step.device))
        return 2 * torch.einsum("cn,cnl->cl", C * torch.expm1(step) / A, powers).real


class GatedNorm(nn.Module):
    """norm(y silu(z)): Mamba-2's RMS norm of each group, computed in float32 at least."""

    def __init__(self, channels: int, n_groups: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.variance_epsilon, self.n_groups = EPSILON, n_groups

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Return the gated and normed y, (batch, token, channel), in the gate's dtype."""
        grouped = (_wide(y) * F.silu(_wide(gate))).unflatten(-1, (self.n_groups, -1))
        normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.flatten(2).to(gate.dtype)


class Gate(nn.Module):
    """y silu(z), in the place of Mamba-2's norm."""

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """Return the gated y, (batch, token, channel)."""
        return y.to(gate.dtype) * F.silu(gate)


BLOCKS: dict[str, type[nn.Module]] = {"mamba1": MambaBlock, "mamba2": Mamba2Block, "s4d": S4DBlock}


class Logits(NamedTuple):
    """What a language model returns: logits (batch, token, vocab)."""

    logits: Float[Tensor, "batch token vocab"]


class LanguageModel(nn.Module):
    """Embedding, blocks with a norm before each and a residual around it, norm, head: MambaForCausalLM's layout.

    Args:
        mixers: blocks of equal d_model, in order; they are numbered here.
        vocab_size: token ids.

    Raises:
        ValueError: no block, something that is none, one block twice, or blocks of different d_model.

    Example:
        >>> model = LanguageModel([S4DBlock(8, d_state=4), MambaBlock(8)], vocab_size=10)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 10])
    """

    def __init__(self, mixers: Sequence[nn.Module], vocab_size: int):
        super().__init__()
        for mixer in mixers:
            if type(mixer) not in BLOCKS.values():
                raise ValueError(f"LanguageModel: mixers are blocks of mamba_probe.blocks; got {type(mixer).__name__}")
        widths: list[int] = [mixer.sizes["d_model"] for mixer in mixers]  # type: ignore[index, misc]
        if len(set(widths)) != 1 or len(set(map(id, mixers))) < len(mixers):
            raise ValueError(f"LanguageModel: needs blocks of one d_model, at least one, each once; got {widths}")
        _checked(vocab_size=vocab_size)
        for index, mixer in enumerate(mixers):
            mixer.layer_idx = index  # type: ignore[assignment]
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(vocab_size, widths[0])
        self.backbone.layers = nn.ModuleList(_Layer(mixer, widths[0]) for mixer in mixers)
        self.backbone.norm_f = nn.RMSNorm(widths[0], EPSILON)
        self.lm_head = nn.Linear(widths[0], vocab_size, bias=False)

    def forward(
        self, input_ids: Int[Tensor, "batch token"], attention_mask: Int[Tensor, "batch token"] | None = None
    ) -> Logits:
        """Return the logits of every token."""
        hidden = self.get_input_embeddings()(input_ids)
        for layer in self.backbone.layers:  # type: ignore[union-attr]
            hidden = layer(hidden, attention_mask)
        return Logits(self.lm_head(self.backbone.norm_f(hidden)))  # type: ignore[operator]

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding, as transformers' models do."""
        return self.backbone.embeddings  # type: ignore[return-value]

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head, as transformers' models do."""
        return self.lm_head


class _Layer(nn.Module):
    def __init__(self, mixer: nn.Module, d_model: int):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, EPSILON)
        self.mixer = mixer

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        return hidden + self.mixer(self.norm(hidden), attention_mask=attention_mask)


def build(config: Mapping[str, Any]) -> nn.Module:
    """Return the block or language model that `config_of` described, freshly initialised.

    Args:
        config: `mixers`, each a dict with its `kind` ("mamba1", "mamba2" or "s4d") and sizes, and `vocab_size`, None
            for a bare block.

    Raises:
        ValueError: an unknown kind or size, or several mixers without a vocabulary.

    Example:
        >>> build({"mixers": [{"kind": "s4d", "d_model": 4, "d_state": 2}], "vocab_size": None}).sizes["d_inner"]
        8
    """
    mixers, vocab_size = [_mixer(dict(each)) for each in config["mixers"]], config["vocab_size"]
    if vocab_size is not None:
        return LanguageModel(mixers, vocab_size)
    if len(mixers) != 1:
        raise ValueError(f"a model without a vocabulary is one bare block; got {len(mixers)}")
    return mixers[0]


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return what `build` makes a model of these sizes from.

    Raises:
        ValueError: `model` is none of ours.

    Example:
        >>> config_of(S4DBlock(4, d_state=2))["mixers"]
        [{'kind': 's4d', 'd_model': 4, 'd_inner': 8, 'd_state': 2, 'd_conv': 4}]
    """
    kinds = {block: kind for kind, block in BLOCKS.items()}
    mixers = [model]
    if isinstance(model, LanguageModel):
        mixers = [layer.mixer for layer in model.backbone.layers]  # type: ignore[union-attr]
    if not all(type(mixer) in kinds for mixer in mixers):
        raise ValueError(f"{type(model).__name__} is no block or language model of mamba_probe.blocks")
    vocab_size = model.lm_head.out_features if isinstance(model, LanguageModel) else None
    described = [{"kind": kinds[type(mixer)], **mixer.sizes} for mixer in mixers]  # type: ignore[dict-item]
    return {"model_type": MODEL_TYPE, "vocab_size": vocab_size, "mixers": described}


def causal_conv1d_fn(
    x: Float[Tensor, "batch channel token"],
    weight: Float[Tensor, "channel tap"],
    bias: Float[Tensor, " channel"] | None = None,
    activation: str | None = None,
) -> Float[Tensor, "batch channel token"]:
    """Return the causal convolution of each channel; the last tap is the current token's. A probe puts itself here."""
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    out = F.conv1d(padded, weight[:, None], bias, groups=x.shape[1])
    return F.silu(out) if activation == "silu" else out


def _mixer(described: dict[str, Any]) -> nn.Module:
    kind = described.pop("kind", None)
    if not isinstance(kind, str) or kind not in BLOCKS:
        raise ValueError(f"kind of a block must be one of {list(BLOCKS)}; got {kind!r}")
    try:
        return BLOCKS[kind](**described)
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from error


def _checked(**counts: int) -> dict[str, int]:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1; got {count!r}")
        if count > MOST:
            raise ValueError(f"{name} is at most {MOST}; got {count}")
    return counts


def _masked(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    return hidden if attention_mask is None else hidden * attention_mask[..., None].to(hidden.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: what decays and norms are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _step_sizes(count: int) -> Tensor:
    low, high = map(math.log, STEP_SIZES)
    return torch.exp(low + (high - low) * torch.rand(count))


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))
