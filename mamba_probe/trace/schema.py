"""The trace's contract, as data: which variables exist, over which dimensions, in which units.

No logic lives here. Dimensions are singular and never `time` or `seq`: delta measures time.
A Mamba-1 layer has one channel a head, so its traces say `channel` where Mamba-2's say `head`.
"""

from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["COORDS", "DEFAULT_VARIABLES", "DIMS", "DIRECTIONS", "FAMILIES", "SCHEMA_VERSION", "VARIABLES", "Variable"]

SCHEMA_VERSION = 1
FAMILIES = ("mamba", "mamba2", "s4d")
"""Parameterisations a trace may hold: `mamba` (S6, A per channel and state), `mamba2` (SSD, A per head), `s4d` (time-
invariant: delta, A, B and C without batch and token, complex; h complex; a state counts for its conjugate too)."""

DIMS = (
    "layer", "batch", "token", "channel", "head", "head_channel", "group", "state", "model",
    "rank", "vocab", "lag", "level", "query_token", "key_token", "direction", "intervention",
)  # fmt: skip


DIRECTIONS = MappingProxyType({"forward": False, "backward": True, "rc_forward": True, "rc_backward": False})
"""What the dimension `direction` may hold, and whether that scan takes the tokens from the last to the first: the two
of a layer that scans both ways, and those of the same layer applied to the reverse complement."""


@dataclass(frozen=True)
class Variable:
    """One recorded tensor: its dimensions in each family and what a reader needs to know of it."""

    by_family: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    long_name: str
    units: str
    symbol: str
    dtype: str = "float32"
    of_scan: bool = True

    def dims(self, family: str, directed: bool = False) -> tuple[str, ...]:
        """Dimensions of this variable in a trace of `family`; none where that family has no such variable.

        A `directed` trace, of layers that scan in several directions, has what is of the scan once for each of them.
        """
        dims = self.by_family[FAMILIES.index(family)]
        return (*dims, "direction") if directed and self.of_scan and dims else dims

    def static(self, family: str) -> bool:
        """Whether it has no batch and token in a trace of `family`."""
        return "token" not in self.dims(family)


_STEP = ("layer", "batch", "token")
_CHANNEL, _HEADS, _GROUP = (*_STEP, "channel"), (*_STEP, "head", "head_channel"), (*_STEP, "group", "state")
_CONSTANT = ("layer", "channel", "state")
_PER_CHANNEL = (_CHANNEL, _HEADS, _CHANNEL)
_PER_DELTA = (_CHANNEL, (*_STEP, "head"), ("layer", "channel"))
_PER_GROUP = (_GROUP, _GROUP, _CONSTANT)
_MODEL = (*_STEP, "model")

VARIABLES = MappingProxyType(
    {
        "delta": Variable(_PER_DELTA, "step size, after bias, softplus and limits", "1", r"\Delta_t"),
        "A": Variable((_CONSTANT, ("layer", "head"), _CONSTANT), "continuous-time state matrix", "1", "A"),
        "A_bar": Variable(
            ((*_CHANNEL, "state"), (*_STEP, "head"), _CONSTANT), "decay of one step, exp(delta A)", "1", r"\bar{A}_t"
        ),
        "B_bar": Variable(
            ((*_CHANNEL, "state"), (*_STEP, "head", "state"), _CONSTANT),
            "write of one step, delta B, by phi1(delta A) with zoh",
            "1",
            r"\bar{B}_t",
        ),
        "B": Variable(_PER_GROUP, "input matrix, as the scan received it", "1", "B_t"),
        "C": Variable(_PER_GROUP, "output matrix, as the scan received it", "1", "C_t"),
        "x": Variable(_PER_CHANNEL, "scan input, after the convolution and its activation", "1", "x_t"),
        "z": Variable(_PER_CHANNEL, "gate before its activation", "1", "z_t"),
        "y": Variable(_PER_CHANNEL, "scan output C h + D x, before the gate", "1", "y_t"),
        "h": Variable(
            ((*_CHANNEL, "state"), (*_HEADS, "state"), (*_CHANNEL, "state")),
            "state after the step",
            "1",
            "h_t",
        ),
        "delta_cumsum": Variable(
            (*_PER_DELTA[:2], ()),
            "sum of delta from the row's first token on, padding included, up to and with this token",
            "1",
            r"\sum\Delta",
            "float64",
        ),
        "u": Variable((_MODEL, _MODEL, _MODEL), "mixer input", "1", "u_t", of_scan=False),
        "out": Variable((_MODEL, _MODEL, _MODEL), "mixer output", "1", "o_t", of_scan=False),
    }
)
"""What `probe.record(variables=...)` can be asked for."""

DEFAULT_VARIABLES = ("delta", "A", "B", "C")

COORDS = MappingProxyType(
    {
        "token_id": ("batch", "token"),
        "valid": ("batch", "token"),
        "position": ("batch", "token"),
        "phase": ("batch", "token"),
        "prompt_id": ("batch",),
        "call": ("batch",),
        "parent_row": ("batch", "token"),
        "token_text": ("batch", "token"),
        "role": ("batch", "token"),
        "target": ("batch", "token"),
        "source_token": ("batch", "token"),
        "prediction": ("batch", "token"),
    }
)
"""Coordinates beside the indices. `valid` is False at padding, `position` counts valid tokens (-1 at padding);
`parent_row` is the row, by its `prompt_id`, that has the token before this one: its own but where beams were reordered;
`target`, `source_token`, `prediction` and `parent_row` are -1 where there is none."""
