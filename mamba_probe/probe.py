"""The probe: attach to a live model, record, edit, compare, detach."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from mamba_probe import provenance
from mamba_probe.ablating import ablate_class, ablate_units
from mamba_probe.arguments import whole, wholes
from mamba_probe.associating import associating
from mamba_probe.attaching import check_free_to_attach, chosen_backend, torch_model
from mamba_probe.estimate import Estimate, estimate
from mamba_probe.experiments import Experiments
from mamba_probe.inputs import ModelInput, checked_input
from mamba_probe.jacobian import jacobian
from mamba_probe.keeping import KEEPS
from mamba_probe.listening import check_silent, kept, listen, listening
from mamba_probe.losses import losses
from mamba_probe.mixers import Tap, find_mixers
from mamba_probe.mixers.offload import place
from mamba_probe.parity import measure_parity
from mamba_probe.planning import checked_plan, grouped
from mamba_probe.progress import bar
from mamba_probe.recorder import Plan, Recorder
from mamba_probe.reducing import Reduction
from mamba_probe.reducing.driving import BATCH_SIZE, check_no_trace, reduce
from mamba_probe.relevance import perturbed, relevance
from mamba_probe.remembrance import remembrance
from mamba_probe.showing import probe_html, probe_text
from mamba_probe.streaming import GrowingSink, StreamSink
from mamba_probe.to_store import Storing, check_fits, identity_of, stream, template
from mamba_probe.trace.contract import unknown_name
from mamba_probe.trace.schema import DEFAULT_VARIABLES
from mamba_probe.trace.store import check_free, check_suffix
from mamba_probe.weights import read_statics, read_weights

__all__ = ["Probe", "attach", "detach"]


def attach(model: nn.Module, *, backend: str = "auto") -> "Probe":
    """Take over the scan of every mixer of `model`, this instance only.

    Args:
        model: holds mixers of one of transformers' ten Mamba families, or blocks of `mamba_probe.blocks` (the table is
            docs/supported.md): a language model, its backbone, or a bare mixer; as nnsight or TransformerLens wraps it
            too (docs/interop.md).
        backend: of our scan: "auto" (triton on a GPU, cpu elsewhere), "cpu", "naive" or "triton".

    Returns:
        The probe: a context manager; leaving it, or `detach()`, restores the model bit for bit.

    Raises:
        ValueError: no supported mixer, a probe already attached, non-finite or absent weights, unknown backend.

    >>> import mamba_probe as mp
    >>> model = mp.load("zoo:mqar-mamba1")
    >>> with mp.attach(model) as probe:
    ...     trace = probe.record(mp.tasks.mqar(batch=2, length=64, seed=0))
    >>> trace["delta"].dims
    ('layer', 'batch', 'token', 'channel')
    """
    return Probe(model, backend=backend)


def detach(model: nn.Module) -> None:
    """Take every probe off `model`, also one whose handle was lost or that a deepcopy brought along.

    Raises:
        ValueError: no supported mixer.

    >>> import mamba_probe as mp
    >>> model = mp.load("zoo:mqar-mamba1")
    >>> lost = repr(mp.attach(model))
    >>> mp.detach(model)
    >>> mp.attach(model).attached
    True
    """
    for adapter in find_mixers(torch_model(model)):
        adapter.release()


class Probe(Experiments):
    """An attached probe. Made by `attach`."""

    def __init__(self, model: nn.Module, *, backend: str = "auto"):
        self.model = model = torch_model(model)
        self._parity_error: float | str = "not measured"
        self._adapters = find_mixers(model)
        check_free_to_attach(self._adapters)
        device = place(self._adapters[0].mixer)
        self.backend, self.backend_reason = chosen_backend(device, backend, self._adapters)
        self._taps = {adapter.layer: Tap(adapter.layer, self.backend) for adapter in self._adapters}
        if len(self._taps) != len(self._adapters):
            numbered = ", ".join(f"{adapter.name} is layer {adapter.layer}" for adapter in self._adapters)
            raise ValueError(
                f"two mixers share a layer number ({numbered}): attach to one model at a time, or set layer_idx of"
                " blocks of your own (mp.blocks.LanguageModel numbers them)"
            )
        self._attach()

    # -- attaching -----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        try:
            for adapter in self._adapters:
                adapter.take_over(self._taps[adapter.layer])
        except BaseException:
            self.detach()
            raise

    @property
    def attached(self) -> bool:
        """Whether the model's scans are ours at this moment."""
        return all(adapter.tap is self._taps[adapter.layer] for adapter in self._adapters)

    def detach(self) -> None:
        """Restore the model bit for bit. Calling it twice does nothing more."""
        for adapter in self._adapters:
            if adapter.tap is self._taps[adapter.layer]:
                adapter.release()

    def __exit__(self, *_exception: object) -> None:
        self.detach()

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        """The untouched model, for a comparison."""
        self.detach()
        try:
            yield
        finally:
            self._attach()

    # -- what is there -------------------------------------------------------------------------------------------

    __repr__, _repr_html_ = probe_text, probe_html

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the probed layers, the model's own."""
        return tuple(self._taps)

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Layers that can share one trace: equal family and sizes."""
        return grouped(self._adapters)

    def weights(self, layers: Sequence[int] | None = None) -> xr.Dataset:
        """The static weights that analyses need, by our names, as a Dataset over the same layers.

        Args:
            layers: the model's own layer numbers; None is all.

        Raises:
            ValueError: an unknown layer, or layers of different sizes (see `groups`).
        """
        for layer in () if layers is None else wholes("layers", layers):
            if layer not in self._taps:
                raise unknown_name("layer", layer, [str(known) for known in self.layers])
        return read_weights(self.model, self._adapters, self.groups, layers=layers)

    def estimate(
        self, inputs: Any = None, *, text: Sequence[str] | None = None, tokenizer: Any = None,
        variables: Sequence[str] = DEFAULT_VARIABLES, layers: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None, channels: Sequence[int] | None = None,
    ) -> Estimate:  # fmt: skip
        """What `record` with the same arguments will weigh: bytes by variable; nothing runs.

        Raises:
            ValueError: what `record` refuses of them.

        >>> import mamba_probe as mp
        >>> with mp.attach(mp.load("zoo:mqar-mamba1")) as probe:
        ...     print(probe.estimate(mp.tasks.mqar(batch=2, length=64, seed=0), variables=["delta", "h"]))
        18.2 MB for 1 layer(s), 2 x 64 tokens: delta 141 kB, h 18.1 MB
        """
        adapter = self._adapters[0]
        given = checked_input(self.model, adapter.sizes.width, inputs, None, text, tokenizer)
        plan = checked_plan(self._adapters, self.groups, variables, layers, tokens, channels, given.length)
        dtype = next(adapter.mixer.parameters()).dtype
        return estimate(plan, given.batch, given.length, dtype, adapter.sizes.width)

    # -- recording -----------------------------------------------------------------------------------------------

    def record(
        self, inputs: Any = None, attention_mask: Any = None, *, text: Sequence[str] | None = None,
        tokenizer: Any = None, variables: Sequence[str] = DEFAULT_VARIABLES, layers: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None, channels: Sequence[int] | None = None, batch_size: int | None = None,
        store: str | PathLike[str] | None = None, overwrite: bool = False, resume: bool = False,
        max_memory: int | str | None = None, compress: str | None = None, narrow: Mapping[str, str] | None = None,
        shard: tuple[int, int] | None = None, force: bool = False, progress: bool = False,
        reduce: Sequence[Reduction] | None = None, by: Any = None,
    ) -> xr.Dataset:  # fmt: skip
        """Run the model on `inputs` and record what its scans executed.

        Args:
            inputs: what the model's forward takes: ids (batch, token) for a language model, hidden states
                (batch, token, model) for a bare mixer, a dict of keywords, a `Task`, or an `mp.corpus(...)`.
            attention_mask: (batch, token), 1 at tokens and 0 at padding.
            text: prompts, in place of `inputs`; with `tokenizer` (see `mp.load_tokenizer`). Padded on the right.
            variables: names of the schema: delta, A, A_bar, B_bar, B, C, x, z, y, h, delta_cumsum, u (the mixer's
                input), out.
            layers: the model's own layer numbers; None is all.
            tokens, channels: indices to keep (channels: heads for Mamba-2); None is all. Tokens with gaps between
                them bring delta_cumsum along.
            batch_size: rows a forward call; None is all at once, or, to a `*.zarr`, as many as fit into `max_memory`.
            store: `*.zarr`: the trace goes there while the model runs, by layers and by blocks of `batch_size` rows,
                each whole or absent whatever stops the process; it is returned opened lazily. `*.nc`: the trace, held
                in memory, is written there in the end.
            overwrite: replace what is there, which is removed at once (`*.nc`: when the new one is whole).
            resume: go on with the store of the same recording where one is there: every block that it lacks.
            max_memory: bytes, or text as "8GB": to a `*.zarr` of tensors on their way there (1 GiB); else of the trace
                (what is free now).
            compress: "zstd" or "lz4" of a `*.zarr`; without loss.
            narrow: variables to store in fewer bits, as {"B": "float16"}; read back as fp32, with the largest and the
                root mean square error in their attributes.
            shard: (number, of how many): record only every so-manieth block, beside other processes that write the
                same store; see `mp.shard`.
            force: try what is not expected to fit.
            progress: a bar, on a terminal (stderr) or in a notebook.
            reduce, by: the reductions and classes of `probe.reduce`, whose result is returned; no trace is kept.

        Returns:
            The trace: an `xarray.Dataset` (see `trace.probe`), padding NaN with `valid` False.

        Raises:
            ValueError: wrong input, unknown names (nearest given), non-finite values, an existing store, one of another
                recording, another writer, a trace that does not fit into memory or onto the disk.
            OSError: the disk is full; the store opens, and resumes.
        """
        if reduce is not None or by is not None:
            of_trace = {
                "variables": None if variables is DEFAULT_VARIABLES else variables, "tokens": tokens, "store": store,
                "overwrite": overwrite, "resume": resume, "max_memory": max_memory, "compress": compress,
                "narrow": narrow, "shard": shard, "force": force,
            }  # fmt: skip
            check_no_trace(reduce, of_trace)
            return self.reduce(
                inputs, reduce or (), attention_mask, text=text, tokenizer=tokenizer, by=by, layers=layers,
                channels=channels, batch_size=BATCH_SIZE if batch_size is None else batch_size, progress=progress,
            )  # fmt: skip
        self._check_attached()
        batch_size = None if batch_size is None else whole("batch_size", batch_size, 1)
        given = checked_input(self.model, self._adapters[0].sizes.width, inputs, attention_mask, text, tokenizer)
        plan = checked_plan(self._adapters, self.groups, variables, layers, tokens, channels, given.length)
        if store is not None and check_suffix(store).suffix == ".zarr":
            storing = Storing.checked(
                store, plan, overwrite=overwrite, resume=resume, max_memory=max_memory, compress=compress,
                narrow=narrow, force=force, shard=shard,
            )  # fmt: skip
            return self._stream(storing, plan, given, batch_size, progress)
        if resume or compress is not None or narrow is not None or shard is not None:
            raise ValueError(f'resume, compress, narrow and shard are of a store="*.zarr"; got store={store!r}')
        if store is not None:
            check_free(store, overwrite)
        width, dtype = self._adapters[0].sizes.width, next(self.model.parameters()).dtype
        check_fits(estimate(plan, given.batch, given.length, dtype, width).nbytes, max_memory, force)
        recorder = self._recorder(plan)
        with (
            kept(recorder, given.label, store, overwrite),
            listening(self.model, self._taps, recorder),
            bar("recording", -(-given.batch // (batch_size or given.batch)), progress) as step,
            torch.no_grad(),
        ):
            for piece in given.pieces(batch_size):
                self.model(**piece)
                step("")
        return given.label(recorder.dataset)

    def _stream(
        self, storing: Storing, plan: Plan, given: ModelInput, batch_size: int | None, progress: bool
    ) -> xr.Dataset:
        """`record` to a Zarr store."""
        check_silent(self._taps)
        width, dtype = self._adapters[0].sizes.width, next(self.model.parameters()).dtype
        rows = storing.rows(plan, given, batch_size, self.model, width)
        statics, attrs = self._constants(plan)
        first = given.label(template(plan, rows, given.length, statics, attrs | {"edits": ""}, dtype, width))

        @contextmanager
        def recording(sink: StreamSink) -> Iterator[Recorder]:
            recorder = Recorder(plan, statics, attrs, sink=sink)
            with listening(self.model, self._taps, recorder):
                yield recorder

        edits = [edit for tap in self._taps.values() for edit in tap.edits]
        identity = identity_of(plan, given, rows, self.model, attrs, storing, edits)
        return stream(storing, plan, given, rows, self.model, first, identity, recording, progress)

    @contextmanager
    def recording(
        self, *, variables: Sequence[str] = DEFAULT_VARIABLES, layers: Sequence[int] | None = None,
        channels: Sequence[int] | None = None, store: str | PathLike[str] | None = None, overwrite: bool = False,
        keep: str = "host", compress: str | None = None, narrow: Mapping[str, str] | None = None,
    ) -> Iterator[Recorder]:  # fmt: skip
        """Record every call of the model inside the block, `generate()` included: its prefill and every step.

        Args:
            variables, layers, channels, store, overwrite, compress, narrow: as in `record`; to a `*.zarr` go the rows
                that a call began once a later one begins others, and the last in the end. Nothing resumes there.
            keep: "host": a layer's tensors are copied to the host while the next layers compute. "device": they stay
                where the model is, in `recorder.tensors`, and are copied when `recorder.dataset` is first read.

        Yields:
            The recorder; its `dataset` holds the trace once the block is left. After an exception it holds, and the
            store has, every call that was whole.

        Raises:
            ValueError: wrong names, rows that continue no recorded ones, a recorded layer that did not run, non-finite
                values (found when the model call has come through all recorded layers), an existing store.
        """
        self._check_attached()
        if keep not in KEEPS:
            raise unknown_name("keep", keep, KEEPS)
        plan = checked_plan(self._adapters, self.groups, variables, layers, None, channels, None)
        if store is not None:
            check_free(store, overwrite)
        sink = None
        if store is not None and Path(store).suffix == ".zarr" and keep == "host":
            how = Storing.checked(store, plan, overwrite=overwrite, compress=compress, narrow=narrow)
            sink, store = GrowingSink(how.path, plan, overwrite, how.compress, how.narrow), None
        elif compress is not None or narrow is not None:
            raise ValueError(f'compress and narrow are of a store="*.zarr" and keep="host"; got {store!r}, {keep!r}')
        recorder = Recorder(plan, *self._constants(plan), keep, sink)
        with kept(recorder, lambda trace: trace, store, overwrite), listening(self.model, self._taps, recorder):
            yield recorder

    def _recorder(self, plan: Plan, keep: str = "host") -> Recorder:
        return Recorder(plan, *self._constants(plan), keep)

    def _constants(self, plan: Plan) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Variables without tokens, and the attributes of the trace."""
        recorded = [adapter for adapter in self._adapters if adapter.layer in plan.layers]
        statics = read_statics(recorded, plan.variables)
        if plan.channels is not None:
            statics = {name: values[:, list(plan.channels)] for name, values in statics.items()}
        sizes = plan.sizes
        attrs = provenance.of_model(self.model) | {
            "family": sizes.family,
            "discretization": recorded[0].discretization,
            "backend": self.backend,
            "n_heads": sizes.n_heads,
            "n_groups": sizes.n_groups,
            "parity_error": self._parity_error,
        }
        return statics, attrs

    # -- measurements ------------------------------------------------------------------------------------------------

    # functions of a probe, in a module each
    losses = losses
    jacobian = jacobian
    remembrance = remembrance
    relevance, perturbed = relevance, perturbed
    ablate_class, ablate_units = ablate_class, ablate_units
    associating = associating
    reduce = reduce

    def parity(self, inputs: Any = None, attention_mask: Any = None, **options: Any) -> xr.Dataset:
        """The probe against the untouched model and a float64 oracle, layer by layer, on each layer's own input.

        Args:
            inputs, attention_mask: as in `record` (also `text`, `tokenizer`).

        Returns:
            Over `layer`: out_vs_native, out_vs_oracle, native_vs_oracle, delta, B, C (against the oracle); and the
            scalar logits_vs_native where the model gives logits. Each is max|a - b| / max|b| over valid tokens. The
            attribute `parting` says in words in which layers and quantities they part by more than rounding.

        Raises:
            ValueError: wrong input, or edits are active (the probe would rightly differ).
        """
        self._check_unedited("parity")
        given = checked_input(
            self.model, self._adapters[0].sizes.width, inputs, attention_mask,
            options.pop("text", None), options.pop("tokenizer", None),
        )  # fmt: skip
        if options:
            raise unknown_name("argument", next(iter(options)), ("text", "tokenizer"))
        result = measure_parity(self.model, self._adapters, given, partial(listen, self._taps), self._suspended)
        self._parity_error = float(result["out_vs_native"].max())
        return result
