"""fla's layers, Mamba and Mamba2 (flash-linear-attention), where that package is installed; it is never imported here.

Their forward goes on to `cuda_kernels_forward` (mamba_ssm's kernels) or, without those or a GPU, to a loop of its own.
Probed, it goes to the former on any device, with our scan in the kernels' place and never into the one fused kernel
that train() is given; the convolution is causal_conv1d's where the layer uses it, plain torch in place of fla's own.
Masks act after in_proj, on what is convolved. Equations: `mamba_probe.mixers.mamba` and `.mamba2`.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, ClassVar

from torch import Tensor

from mamba_probe.mixers.base import masked
from mamba_probe.mixers.mamba import MambaAdapter
from mamba_probe.mixers.mamba_ssm import Upstream, UpstreamMamba2, convolutions, ssd
from mamba_probe.mixers.takeover import Seen, called_names, rebind
from mamba_probe.mixers.tap import Call, Tap

__all__ = ["FlaMamba2Adapter", "FlaMambaAdapter"]


class _Fla(Upstream):
    """What both layers share: a cache in `past_key_values`, a tuple returned, two ways through, and masks."""

    looped: ClassVar[str]
    """The method with the loop, whose arguments are `cuda_kernels_forward`'s."""

    def opened(self, given: Mapping[str, Any]) -> Call:
        """A Call for what its forward was given, by name; the mask of a step is that of the sequence before, unused."""
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        continues = cache is not None and len(cache) > self.layer and cache[self.layer] is not None
        return Call(self.layer, None if mask is None or continues else mask.bool(), continues)

    def given(self, returned: Any) -> Tensor:
        """The output (batch, token, model), of what the layer's forward returns."""
        return returned[0]

    def replacements(self, tap: Tap, module: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
        """Nothing: what forward calls itself is on `seen`."""
        return {}

    def take_over(self, tap: Tap) -> None:
        """Put `tap` in the place of the layer's scan.

        Raises:
            ValueError: a release before `past_key_values`, or another activation than SiLU.
        """
        forward = type(self.mixer).forward
        if "past_key_values" not in forward.__code__.co_varnames or "get_layer_cache" not in called_names(forward):
            raise ValueError(
                f"layer {self.layer}: this release of flash-linear-attention is not supported (>= 0.6 is): its"
                f" {type(self.mixer).__name__} has a cache of another kind"
            )
        if self.mixer.activation not in ("silu", "swish"):
            raise ValueError(
                f"layer {self.layer}: {type(self.mixer).__name__} with hidden_act={self.mixer.activation!r} is not"
                " supported: the scan's gate is SiLU"
            )
        super().take_over(tap)

    def seen(self, tap: Tap) -> Any:
        """The layer with `cuda_kernels_forward`, ours, in the place of both ways through."""
        mixer = self.mixer
        library = type(mixer).cuda_kernels_forward
        own = mixer.backend == "cuda" and mixer.conv1d.weight.is_cuda
        convolved = convolutions(tap, *((mixer.causal_conv1d_fn, mixer.causal_conv1d_update) if own else (None, None)))
        options = convolved | {"backend": "cuda", "training": False} | self._norm_instead(tap)
        methods = {
            "cuda_kernels_forward": rebind(library, self._kernels(tap, looped=False)),
            self.looped: rebind(library, self._kernels(tap, looped=True)),
        }
        return Seen(mixer, options, methods)

    @abstractmethod
    def _kernels(self, tap: Tap, *, looped: bool) -> dict[str, Callable[..., Any]]:
        """Our scan and step by their names, to do as the kernels, or as the loop."""

    @property
    def _loops(self) -> bool:
        """Whether forward takes the loop, as it is written: without mamba_ssm, or on the host."""
        forward: FunctionType = type(self.mixer).forward
        return not (forward.__globals__["is_fast_path_available"] and self.mixer.conv1d.weight.is_cuda)


class FlaMambaAdapter(_Fla, MambaAdapter):
    """Reads and takes over `fla.layers.mamba.Mamba`."""

    class_path = ("fla.layers.mamba", "Mamba")
    looped = "slow_forward"

    def _kernels(self, tap: Tap, *, looped: bool) -> dict[str, Callable[..., Any]]:
        scan, step = self._scans(tap).values()
        return {"selective_scan_fn": _apart(scan), "selective_state_update": step}

    def _projected(self, hidden: Tensor, valid: Tensor | None) -> Sequence[Tensor]:
        x, z = super()._projected(hidden, None)
        return masked(x, valid), z


class FlaMamba2Adapter(_Fla, UpstreamMamba2):
    """Reads and takes over `fla.layers.mamba2.Mamba2`.

    Its loop holds delta to the limits in single steps too, and the kernels do not: each is done as where it runs.
    """

    class_path = ("fla.layers.mamba2", "Mamba2")
    looped = "torch_forward"

    def _kernels(self, tap: Tap, *, looped: bool) -> dict[str, Callable[..., Any]]:
        ours = ssd(tap, step_limits=self._limits) if looped else ssd(tap)
        return ours | {"mamba_chunk_scan_combined": _apart(ours["mamba_chunk_scan_combined"])}

    def _projected(self, hidden: Tensor, valid: Tensor | None) -> Sequence[Tensor]:
        z, xBC, dt = super()._projected(hidden, valid if self._loops else None)
        return z, masked(xBC, valid), dt


def _apart(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`scan` with a last state of its own: the layer puts it in the cache, where steps write on it."""

    def scanned(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        y, state = scan(*args, **options)
        return y, state.clone()

    return scanned
