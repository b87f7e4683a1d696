"""Windows of a sequence, the outputs made of their sums, and what a variant of the Haar block plants for them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mamba_probe.constructions.tables import CONV_KERNEL, INVERSE_SOFTPLUS_ONE, Mamba2Table, MambaTable

__all__ = ["FLAT", "HELD", "LOG_DECAY", "ONE", "SHIFT", "Layout", "Plan", "haar_rows"]

LOG_DECAY = -80.0  # A_log: no decay that a float64 can see
ONE = 1.278464542761074  # silu(ONE) = 1
FLAT = float(np.float32(INVERSE_SOFTPLUS_ONE))  # transformers rounds delta's bias to float32, in float64 models too ...
HELD = float(np.logaddexp(0, FLAT))  # ... delta is then this, 4.5e-10 less than 1: out_proj divides by it
SHIFT = 40.0  # silu(t + SHIFT) = t + SHIFT in float64
FEATURES = 3  # u_t, t/T and 1


@dataclass(frozen=True, eq=False)
class Layout:
    """A sequence of `length` tokens in equal windows; output k is `rows[k] @` (the sums of u over the windows)."""

    length: int
    rows: Float[np.ndarray, "kernel window"]

    @property
    def kernels(self) -> int:
        """Number of outputs."""
        return self.rows.shape[0]

    @property
    def windows(self) -> int:
        """Number of windows."""
        return self.rows.shape[1]

    @property
    def span(self) -> int:
        """Tokens of a window."""
        return self.length // self.windows

    @property
    def knots(self) -> np.ndarray:
        """First tokens of the windows but the first."""
        return np.arange(1, self.windows) * self.span

    @property
    def model(self) -> int:
        """Hidden size: the three features go in, the outputs come out."""
        return max(FEATURES, self.kernels)

    @property
    def suffix_rows(self) -> Float[np.ndarray, "kernel window"]:
        """The same outputs from the sums S_a of u over all tokens from a window's first one on."""
        return np.diff(self.rows, axis=1, prepend=0.0)

    def block(self, channels: int, rank: int) -> MambaTable:
        """Return a block with room for `channels`, every weight zero but the convolution's, which is the identity."""
        block = MambaTable.zeros(self.model, -(-channels // self.model) * self.model, state=1, rank=rank)
        block.conv[:channels] = np.eye(1, CONV_KERNEL)
        return block

    def spans(self) -> list[str]:
        """Return the windows as text: [0, 8)."""
        edges = range(0, self.length + 1, self.span)
        return [f"[{first}, {first + self.span})" for first in edges[:-1]]


@dataclass(frozen=True, eq=False)
class Plan:
    """The weights of one variant.

    Arguments:
        block: the weights.
        channels: what each channel is for, the padding left out.
        state: what the one state of a channel is for.
        bound: of the error of an output, for |u| <= 1.
        claim: what the weights do.
        read_out: (kernel, channel), or (kernel, head) in Mamba-2, from the channels' or heads' kernels to the outputs'
            kernels of u, where u enters through x.
        limit: |u| must stay under it.
    """

    block: MambaTable | Mamba2Table
    channels: list[str]
    state: str
    bound: float
    claim: str
    read_out: Float[np.ndarray, "kernel channel"] | None = None
    limit: float = float("inf")


def haar_rows(length: int, windows: int) -> Float[np.ndarray, "kernel window"]:
    """Return the Haar functions of a sequence, one column a window: each is constant on every window."""
    rows = [np.full(windows, length**-0.5)]
    width = windows
    while width > 1:
        wavelet = np.repeat([1.0, -1.0], width // 2) * (width * length / windows) ** -0.5
        rows += list(np.kron(np.eye(windows // width), wavelet))
        width //= 2
    return np.stack(rows)
