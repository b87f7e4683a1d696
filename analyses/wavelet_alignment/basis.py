"""Orthonormal wavelet bases, multilevel: which ones, which coefficient is what, and the functions themselves.

Coefficients are ordered coarse to fine: the scaling functions, then level log2 W (wavelets as long as the window W),
down to level 1 (wavelets of two tokens for Haar). Level 0 names the scaling functions, which are no wavelets.
"""

from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import pywt
from jaxtyping import Bool, Float, Int
from pywt import Modes, Wavelet, wavelist  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

__all__ = ["MODES", "Basis", "orthonormal_wavelet", "window_length"]

MODES = ("periodization", "zero")
"""Modes that keep energies: `periodization` wraps the window round (W functions, orthonormal in it); `zero` takes the
kernel as zero outside of the window (orthonormal on the integers, some functions reach over its ends)."""

DISCRETE = tuple(wavelist(kind="discrete"))
SHORTEST = 4
"""Fewest tokens in which wavelets of two scales exist."""


def orthonormal_wavelet(name: str) -> str:
    """The name of a wavelet whose periodised transform is orthonormal.

    Raises:
        ValueError: pywt does not know it as a discrete wavelet, or it is not orthonormal (bior, rbio, dmey).

    >>> orthonormal_wavelet("haar")
    'haar'
    """
    if name not in DISCRETE:
        close = get_close_matches(str(name), DISCRETE)
        raise ValueError(
            f"unknown wavelet {name!r}: needed is an orthonormal discrete wavelet of pywt, as 'haar', 'db2' or 'sym4'"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    wavelet = Wavelet(name)
    taps = np.asarray(wavelet.dec_lo)
    overlap = np.correlate(taps, taps, "full")[len(taps) - 1 :: 2]
    if not wavelet.orthogonal or np.abs(overlap - np.eye(1, len(overlap))[0]).max() > 1e-8:
        raise ValueError(
            f"wavelet {name!r} is not orthonormal, so energies and cosines would not add up; use 'haar' or 'db2'"
        )
    return name


def window_length(n_tokens: int) -> int:
    """The dyadic window rule: the last 2^floor(log2 n) of n valid tokens, never padded.

    Raises:
        ValueError: fewer than 4 tokens.

    >>> window_length(100)
    64
    """
    if n_tokens < SHORTEST:
        raise ValueError(f"a wavelet window needs at least {SHORTEST} valid tokens up to the query; got {n_tokens}")
    return 1 << (n_tokens.bit_length() - 1)


@dataclass(frozen=True)
class Basis:
    """A wavelet and how its transform treats the window's ends.

    Raises:
        ValueError: the wavelet is not orthonormal, or the mode does not keep energies.

    >>> Basis("haar").transform(np.ones((1, 4))).round(6).tolist()
    [[2.0, 0.0, 0.0, 0.0]]
    >>> Basis("haar").levels(8).tolist()
    [0, 3, 2, 2, 1, 1, 1, 1]
    """

    wavelet: str
    mode: str = "periodization"

    def __post_init__(self) -> None:
        orthonormal_wavelet(self.wavelet)
        if self.mode in MODES:
            return
        if self.mode in Modes.modes:
            raise ValueError(
                f"mode {self.mode!r} continues a kernel by values that no token has, so its coefficients hold another"
                f" energy than the kernel; use one of {MODES}"
            )
        raise ValueError(f"unknown mode {self.mode!r}: needed is one of {MODES}")

    def transform(self, kernel: Float[np.ndarray, "kernel token"]) -> Float[np.ndarray, "kernel coefficient"]:
        """Coordinates in the basis, log2 W levels; the window W is a power of two."""
        smooth, details = kernel, []
        for _ in range(_depth(kernel.shape[1])):
            smooth, detail = pywt.dwt(smooth, self.wavelet, mode=self.mode, axis=1)
            details.append(detail)
        return np.concatenate([smooth, *reversed(details)], axis=1)

    def levels(self, window: int) -> Int[np.ndarray, " coefficient"]:
        """Level of each coefficient: 0 the scaling functions, then log2 W down to 1."""
        sizes = self._sizes(window)
        return np.repeat([0, *range(len(sizes) - 1, 0, -1)], sizes)

    def coarse(self, window: int, level: int) -> Bool[np.ndarray, " coefficient"]:
        """Which functions span the coarse space: the scaling functions and the `level` coarsest levels."""
        of = self.levels(window)
        return (of == 0) | (of > _depth(window) - level)

    def function(self, index: int, window: int) -> Float[np.ndarray, " token"]:
        """One function of the basis, over the window.

        >>> Basis("haar").function(1, 4).round(6).tolist()
        [0.5, 0.5, -0.5, -0.5]
        """
        sizes = self._sizes(window)
        bands = np.split(np.eye(1, sum(sizes), index)[0], np.cumsum(sizes)[:-1])
        smooth, *details = bands
        for detail in details:
            smooth = pywt.idwt(smooth[: len(detail)], detail, self.wavelet, mode=self.mode)
        return smooth[:window]

    def _sizes(self, window: int) -> list[int]:
        """Number of coefficients of each level, scaling functions first."""
        length, sizes = window, []
        taps = Wavelet(self.wavelet).dec_len
        for _ in range(_depth(window)):
            length = length // 2 if self.mode == "periodization" else (length + taps - 1) // 2
            sizes.append(length)
        return [length, *reversed(sizes)]


def _depth(window: int) -> int:
    return window.bit_length() - 1
