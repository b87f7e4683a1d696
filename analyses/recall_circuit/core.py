"""Arrays of the recall circuit: who wrote what a query reads, through which weights. No labels, no files, no torch.

Symbols, for one prompt of one layer (Mamba-1: a head is a channel and head_channel is 1):
    delta (token, head)                 step sizes, as executed; cumulative, their inclusive sum over tokens
    A     (head, decay)                 continuous-time state matrix; decay is state, or 1 for one scalar a head
    B, C  (token, group, state)         head is a multiple of group
    x, z  (token, head, head_channel)   scan input and gate before its activation
    Cum(s, t) = sum_{s<r<=t} delta_r    the decay between a write at s and a read at t is exp(A Cum(s, t))
All in float64. The signatures are ours.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Inexact, Int
from scipy.special import expit

from mamba_probe.analyses.common import attention_row

__all__ = [
    "Prompt",
    "Questions",
    "Reader",
    "Run",
    "contribution",
    "gate_energy",
    "gated_output",
    "identity_error",
    "log_delta_contrast",
    "mean_log_delta",
    "norm_scale",
    "ratio",
    "readout",
    "relative_tap",
    "silu",
    "tap_mass",
    "write_energy",
    "written",
]


@dataclass(frozen=True)
class Run:
    """What some tokens of a prompt that follow one another write; symbols as at the head of this file."""

    delta: Float[np.ndarray, "token head"]
    cumulative: Float[np.ndarray, "token head"]
    A: Inexact[np.ndarray, "head decay"]
    B: Inexact[np.ndarray, "token group state"]
    x: Float[np.ndarray, "token head head_channel"]
    zoh: bool = False


@dataclass(frozen=True)
class Reader:
    """What one token reads with, and the scan input that its D path passes on."""

    cumulative: Float[np.ndarray, " head"]
    C: Inexact[np.ndarray, "group state"]
    z: Float[np.ndarray, "head head_channel"]
    x: Float[np.ndarray, "head head_channel"]


@dataclass(frozen=True)
class Prompt:
    """One prompt of one layer, padding already removed, or a run of its tokens; symbols as at the head of this file."""

    delta: Float[np.ndarray, "token head"]
    cumulative: Float[np.ndarray, "token head"]
    A: Inexact[np.ndarray, "head decay"]
    B: Inexact[np.ndarray, "token group state"]
    C: Inexact[np.ndarray, "token group state"]
    x: Float[np.ndarray, "token head head_channel"]
    z: Float[np.ndarray, "token head head_channel"]
    zoh: bool = False

    @property
    def run(self) -> Run:
        """What its tokens write."""
        return Run(self.delta, self.cumulative, self.A, self.B, self.x, self.zoh)

    def reader(self, token: int) -> Reader:
        """What one of its tokens reads with: copies, which do not hold the prompt in memory."""
        return Reader(*(np.array(of[token]) for of in (self.cumulative, self.C, self.z, self.x)))


@dataclass(frozen=True)
class Questions:
    """What one prompt asks: `n` scored queries, as indices into its tokens.

    Attributes:
        query: tokens that ask.
        truth: the value token that answers each query.
        value: index of the right value in the value vocabulary.
        pairs: value tokens of the context, where a pair is complete.
        keys: whether a token is a key or a query.
    """

    query: Int[np.ndarray, " n"]
    truth: Int[np.ndarray, " n"]
    value: Int[np.ndarray, " n"]
    pairs: Int[np.ndarray, " pair"]
    keys: Bool[np.ndarray, " token"]


def silu(a: float | Float[np.ndarray, "*shape"]) -> float | Float[np.ndarray, "*shape"]:
    """SiLU(a) = a / (1 + exp(-a)), without overflow.

    >>> silu(np.array([0.0, 1.0, -1000.0])).round(4).tolist()
    [0.0, 0.7311, -0.0]
    """
    return a * expit(a)


def ratio(
    numerator: Float[np.ndarray, "*shape"], denominator: Float[np.ndarray, "*#shape"]
) -> Float[np.ndarray, "*shape"]:
    """`numerator / denominator`, NaN where the denominator is 0.

    >>> ratio(np.array([1.0, 1.0]), np.array([2.0, 0.0])).tolist()
    [0.5, nan]
    """
    defined = denominator != 0
    return np.where(defined, numerator / np.where(defined, denominator, 1.0), np.nan)


def contribution(
    prompt: Prompt, query: int, sources: Int[np.ndarray, " source"], faded: bool = True
) -> Float[np.ndarray, "source head head_channel"]:
    """What each source adds to the input of `out_proj` at the query (ours; after Ali et al. 2024, arXiv 2403.01590).

    o_{t,s} = SiLU(z_t) x_s delta_s sum_n C_t[n] B_s[n] exp(A[n] Cum(s, t)), before `W_out`.

    Args:
        prompt: one prompt of one layer.
        query: the token t that reads.
        sources: tokens s <= t that may have written.
        faded: as in `written`.

    >>> one, step = np.ones((3, 1, 1)), np.ones((3, 1))
    >>> prompt = Prompt(step, np.cumsum(step, axis=0), A=np.zeros((1, 1)), B=one, C=one, x=one, z=50 * one)
    >>> contribution(prompt, 2, np.array([0, 1])).ravel().tolist()
    [50.0, 50.0]
    """
    return silu(prompt.z[query]) * written(prompt.run, prompt.reader(query), sources, faded)


def written(
    run: Run, reader: Reader, sources: slice | Int[np.ndarray, " source"], faded: bool = True
) -> Float[np.ndarray, "source head head_channel"]:
    """`contribution` before the gate: x_s delta_s sum_n C_t[n] B_s[n] exp(A[n] Cum(s, t)).

    Args:
        run: tokens that write.
        reader: the token t that reads.
        sources: which of the run's tokens, none of them after t.
        faded: False leaves all decay out, exp(A Cum) = 1, as `ablate("decay")` does: writes stay as they are.

    Returns:
        (source, head, head_channel). Cost O(source head state): never token x token.
    """
    elapsed = (reader.cumulative - run.cumulative[sources]) * float(faded)
    groups = np.arange(len(run.A)) // (len(run.A) // run.B.shape[1])
    B = run.B[:1] if np.iscomplexobj(run.A) else run.B[sources]  # S4D's is constant
    A = run.A if faded or run.zoh else np.zeros((len(run.A), 1))  # exp(0) = 1: all states are one
    kernel = attention_row(run.delta[sources], elapsed, A, B, reader.C, groups, run.zoh)
    return run.x[sources] * kernel[..., None]


def gated_output(
    read: Float[np.ndarray, "head head_channel"], reader: Reader, skip: Float[np.ndarray, "head ..."]
) -> Float[np.ndarray, "head head_channel"]:
    """The input of `out_proj` at one token, or of the gated norm before it: SiLU(z_t) (sum_{s<=t} written_s + D x_t).

    Args:
        read: the sum of `written` over all sources up to and with the token.
        reader: the token.
        skip: D, by head or by head and head_channel.

    >>> one, step = np.ones((2, 1, 1)), np.ones((2, 1))
    >>> prompt = Prompt(step, np.cumsum(step, axis=0), A=np.zeros((1, 1)), B=one, C=one, x=one, z=50 * one)
    >>> gated_output(written(prompt.run, prompt.reader(1), slice(2)).sum(axis=0), prompt.reader(1), np.array([3.0]))
    array([[250.]])
    """
    return np.asarray(silu(reader.z)) * (read + skip.reshape(len(skip), -1) * reader.x)


def identity_error(
    gated: Float[np.ndarray, "head head_channel"],
    out_proj: Float[np.ndarray, "model head head_channel"],
    out: Float[np.ndarray, " model"],
    norm_groups: int,
) -> float:
    """max |W_out gated - out| / max |out| at one token: does the attribution add up to the mixer's output?

    Args:
        gated: from `gated_output`.
        out_proj: W_out, a gated norm's weight multiplied in.
        out: the mixer's output at that token.
        norm_groups: groups of the gated norm before `out_proj`, whose scales are frozen and here fitted by least
            squares; 0: no norm.

    >>> identity_error(np.ones((1, 1)), np.ones((2, 1, 1)), np.array([1.0, 2.0]), 0)
    0.5
    """
    groups = max(norm_groups, 1)
    paths = np.einsum("mghp,ghp->mg", *(_by_group(array, groups) for array in (out_proj, gated)))
    scale = np.linalg.lstsq(paths, out)[0] if norm_groups else np.ones(1)
    return ratio(np.abs(paths @ scale - out).max(keepdims=True), np.abs(out).max(keepdims=True)).item()


def norm_scale(gated: Float[np.ndarray, "head head_channel"], groups: int) -> Float[np.ndarray, " head"]:
    """Scale of a gated RMS norm at one token, 1 / rms of each group of heads (its epsilon is left out; 1 for zeros).

    >>> norm_scale(np.array([[3.0], [4.0]]), 2).round(4).tolist()
    [0.3333, 0.25]
    """
    rms = np.sqrt((_by_group(gated, groups) ** 2).mean(axis=(-2, -1)))
    return np.repeat(1 / np.where(rms == 0, 1.0, rms), len(gated) // groups)


def _by_group(
    array: Float[np.ndarray, "*any head head_channel"], groups: int
) -> Float[np.ndarray, "*any group member head_channel"]:
    return array.reshape(*array.shape[:-2], groups, -1, array.shape[-1])


def readout(
    unembedding: Float[np.ndarray, "value model"],
    norm_f: Float[np.ndarray, " model"],
    out_proj: Float[np.ndarray, "model head head_channel"],
) -> Float[np.ndarray, "value head head_channel"]:
    """The linear path from the input of `out_proj` to the value logits, centred over the values.

    R = centre[(U norm_f) W_out]. The final norm is frozen: its scale is one positive number a token, which changes no
    argmax and no share; later layers are not followed.

    >>> readout(np.eye(2), np.ones(2), np.ones((2, 1, 1))).ravel().tolist()
    [0.0, 0.0]
    """
    logits = np.tensordot(unembedding * norm_f, out_proj, axes=1)
    return logits - logits.mean(axis=0)


def write_energy(prompt: Prompt, out_energy: Float[np.ndarray, "head head_channel"]) -> Float[np.ndarray, " token"]:
    """E_s of S7: sum over channels of |W_out column|^2 (delta_s x_s)^2, times |B_s|^2 of the channel's group.

    Where delta and B are the same at every token (S4D, complex A), x_s alone is left of it.

    Args:
        prompt: one prompt of one layer.
        out_energy: squared norm of each column of `out_proj`.
    """
    if np.iscomplexobj(prompt.A):
        return np.einsum("hp,thp->t", out_energy, prompt.x**2)
    per_head = np.einsum("hp,thp->th", out_energy, (prompt.delta[..., None] * prompt.x) ** 2)
    size = (prompt.B**2).sum(axis=-1)
    return (per_head * np.repeat(size, per_head.shape[1] // size.shape[1], axis=1)).sum(axis=-1)


def gate_energy(prompt: Prompt, out_energy: Float[np.ndarray, "head head_channel"]) -> Float[np.ndarray, " token"]:
    """|g_t|^2 of S9: sum over channels of |W_out column|^2 SiLU(z_t)^2."""
    return np.einsum("hp,thp->t", out_energy, silu(prompt.z) ** 2)


def mean_log_delta(delta: Float[np.ndarray, "token head"]) -> Float[np.ndarray, " token"]:
    """Mean log delta over heads; a delta of 0 counts as the least normal float32."""
    return np.log(np.maximum(delta, np.finfo(np.float32).tiny)).mean(axis=1)


def log_delta_contrast(log_delta: Float[np.ndarray, " token"], writes: Bool[np.ndarray, " token"]) -> float:
    """S8: mean log delta at the candidate writes minus elsewhere.

    >>> log_delta_contrast(mean_log_delta(np.array([[1.0], [np.e]])), np.array([False, True]))
    1.0
    """
    if writes.all() or not writes.any():
        return float("nan")
    return float(log_delta[writes].mean() - log_delta[~writes].mean())


def tap_mass(
    conv: Float[np.ndarray, "channel lag"], weight: Float[np.ndarray, " channel"]
) -> Float[np.ndarray, " lag"]:
    """S10: m(l), the share of squared convolution weight at lag l, channels weighted by what reads them.

    >>> tap_mass(np.array([[0.0, 2.0], [1.0, 0.0]]), np.array([1.0, 0.0])).tolist()
    [0.0, 1.0]
    """
    mass = weight @ conv**2
    return ratio(mass, mass.sum(keepdims=True))


def relative_tap(write: Float[np.ndarray, " lag"], value: Float[np.ndarray, " lag"]) -> float:
    """P_rel = sum_{b-a=1} m_B(b) m_x(a): B looks one token further back than x, whatever the offset; uniform taps of
    width k give (k-1)/k^2.

    >>> relative_tap(np.full(4, 0.25), np.full(4, 0.25))
    0.1875
    """
    return float((write[1:] * value[:-1]).sum())
