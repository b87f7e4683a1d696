"""Horizons against interventions, like with like: an impulse on the state decays as retention says; a token does as
its Jacobian says. And the two come apart: retained but never written, kept and never read.
"""

import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon
from mamba_probe.analyses.memory_horizon.sources import falls_for_good
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock
from mamba_probe.kernels.scan import Emit, selective_scan

WIDTH, LENGTH = 6, 40
BLOCKS = {
    "mamba1": lambda: MambaBlock(WIDTH, d_state=4),
    "mamba2": lambda: Mamba2Block(WIDTH, n_heads=4, d_state=4, n_groups=2),
    "s4d": lambda: S4DBlock(WIDTH, d_state=4),
}
VARIABLES = ("delta", "A", "B", "C", "x")


def model_of(mixer: str, n_layers: int = 1, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel([BLOCKS[mixer]() for _ in range(n_layers)], vocab_size=30).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
            parameter += 1.5 if name.endswith("log_dt") else 0.0  # S4D's writes: some decay within the prompt
    return model


def prompts(n_rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 30, (n_rows, LENGTH), generator=torch.Generator().manual_seed(1))


def scan_of(trace: xr.Dataset, tokens: slice, state: torch.Tensor | None):
    """The recurrence of a recorded layer over some tokens, from a state, in float64."""
    constant = trace.attrs["family"] == "s4d"

    def of(name: str) -> torch.Tensor:
        values = trace[name].isel(layer=0)
        values = values.isel(token=tokens) if "token" in values.dims else values
        return torch.tensor(values.values.astype(np.result_type(values.dtype, np.float64)))

    x, delta, A, B, C = (of(name) for name in ("x", "delta", "A", "B", "C"))
    x = x if x.ndim == 4 else x[..., None]
    delta = delta.expand(x.shape[:3]) if constant else delta
    emit = Emit(variables=("h", "A_bar"))
    return selective_scan(
        x, delta, A, B, C, initial_state=state, discretization=trace.attrs["discretization"], emit=emit
    )


@pytest.mark.parametrize("mixer", sorted(BLOCKS))
def test_an_impulse_on_the_state_decays_as_retention_says(mixer: str) -> None:
    """Split scan at s, run twice, h_s moved in one: the difference is exp(A Cum), and falls at the horizon."""
    with mp.attach(model_of(mixer)) as probe:
        trace = probe.record(prompts(), variables=VARIABLES)
    s = 7
    result = memory_horizon.measure(trace, level=["1/e", "1/2"], tokens=[s])
    state = scan_of(trace, slice(0, s + 1), None).last_state
    runs = [scan_of(trace, slice(s + 1, None), moved).emission.h for moved in (state, state + 1.0)]
    left = (runs[1] - runs[0]).abs().numpy()[:, :, :, 0]  # (batch, token, head, state); channels of a head alike
    delta = trace["delta"].isel(layer=0).values.astype(float)
    delta = np.broadcast_to(delta, (*left.shape[:2], delta.shape[-1])) if delta.ndim == 1 else delta[:, s + 1 :]
    A = trace["A"].isel(layer=0).values.real.astype(float)
    A = A if A.ndim == 2 else np.repeat(A[:, None], left.shape[-1], 1)
    retention = np.exp(np.cumsum(delta, axis=1)[..., None] * A)
    assert np.abs(left - retention).max() < 1e-6
    assert left.min() < 0.3 < left.max(), "both decayed and kept"
    for name, level in (("1/e", np.exp(-1)), ("1/2", 0.5)):
        found = result["token_forward_horizon"].sel(level=name).values[0, :, 0]
        fallen = left <= level * (1 + 1e-9)
        seen = np.where(fallen.any(1), fallen.argmax(1) + 1.0, np.inf)
        np.testing.assert_array_equal(found, seen[..., : found.shape[-1]])


@pytest.mark.parametrize("mixer", sorted(BLOCKS))
def test_changing_a_token_lasts_as_long_as_its_jacobian_says(mixer: str) -> None:
    """Move the mixer input of one token, feature by feature, and watch the output: no frozen horizon is asked."""
    model, tokens = model_of(mixer), [3, 17, LENGTH - 1]
    with mp.attach(model) as probe:
        trace = probe.record(prompts())
        jacobian = probe.jacobian(prompts(), layer=0, source_tokens=tokens)
        result = memory_horizon.measure(trace, level=["1/e", "1/2", 0.05], jacobian=jacobian)
        block = model.backbone.layers[0]
        caught = []
        handle = block.mixer.register_forward_pre_hook(
            lambda _, args, kwargs: caught.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
        )
        with torch.no_grad():
            model(prompts())
            handle.remove()
            moved = [_moved(block.mixer, caught[0], s) for s in tokens]
    for (i, s), (name, level) in ((a, b) for a in enumerate(tokens) for b in result["retention"].to_series().items()):
        for row in range(2):
            size = moved[i][row, s:]
            above = np.flatnonzero(size > level * size.max())
            ends = above[-1] == len(size) - 1
            got = [result[f"jacobian_horizon{end}"].sel(level=name).values[0, row, i] for end in ("", "_at_least")]
            assert got == [np.inf if ends else max(1, above[-1] + 1), max(1, above[-1] + 1)]
    assert np.isinf(result["jacobian_horizon"].sel(source_token=LENGTH - 1)).all(), "the last token is censored"


def _moved(mixer: torch.nn.Module, hidden: torch.Tensor, s: int, step: float = 1e-5) -> np.ndarray:
    """|d out_t / d u_s| over t by central differences: (batch, token)."""
    total = 0.0
    for feature in range(WIDTH):
        change = torch.zeros_like(hidden)
        change[:, s, feature] = step
        total = total + ((mixer(hidden + change) - mixer(hidden - change)) / (2 * step)).square().sum(-1)
    return total.sqrt().numpy()


def test_the_frozen_horizon_stands_beside_the_jacobian_of_each_token() -> None:
    with mp.attach(model_of("mamba1", n_layers=2)) as probe:
        trace = probe.record(prompts())
        jacobian = probe.jacobian(prompts(), layer=1, source_tokens=[4, 20])
    result = memory_horizon.measure(trace, tokens=[4, 20], jacobian=[jacobian])
    flat = result["token_forward_horizon"].sel(layer=1).values.reshape(2, 2, -1)
    wanted = np.sort(flat, -1)[..., [int(np.ceil(q * flat.shape[-1])) - 1 for q in (0.1, 0.5, 0.9)]]
    np.testing.assert_array_equal(result["source_forward_horizon"].sel(layer=1), wanted)
    assert np.isnan(result["jacobian_horizon"].sel(layer=0)).all(), "no Jacobian of that layer was given"
    assert "Frobenius" in result.attrs["jacobian_estimator"]
    assert result["source_token"].values.tolist() == [4, 20]


def test_retained_but_never_written() -> None:
    """keep_nth "event": a later token decays in no step and is never written: it moves nothing beyond the kept one."""
    kept, later = 10, 15
    construction = mp.constructions.keep_nth(n_tokens=4, length=32, n=kept, profile="event", dtype=torch.float64)
    given = construction.inputs(np.random.default_rng(0).integers(0, 4, (1, 32)))
    code = np.eye(6)[1]  # the code of a token id
    with mp.attach(construction.model) as probe:
        trace = probe.record(given)
        sent = probe.jacobian(given, layer=0, source_tokens=[kept, later], direction=code)
    result = memory_horizon.measure(trace, tokens=[kept, later], jacobian=sent)
    assert np.isinf(result["token_forward_horizon"]).all(), "both are retained to the end"
    size = sent["jacobian"].isel(batch=0).sel(token=slice(later, None)).values
    assert size[0].min() > 0.1
    assert size[1].max() < 1e-20, "what is never written moves nothing"


def test_kept_and_never_read() -> None:
    """mqar: a pair that nobody asks for is written and held, and no query's output moves with it."""
    construction = mp.constructions.mqar(n_keys=8, n_values=8, dtype=torch.float64)
    asked_key, other_key, asked_value, other_value = 1, 2, 9, 10
    ids = np.array([[asked_key, asked_value, other_key, other_value, 0, 0, asked_key, 0]])
    value = construction.model.backbone.embeddings.weight[other_value].detach().numpy()
    with mp.attach(construction.model) as probe:
        trace = probe.record(ids)
        sent = probe.jacobian(ids, layer=0, source_tokens=[1, 3], direction=value)
    result = memory_horizon.measure(trace, tokens=[1, 3], jacobian=sent)
    assert np.isinf(result["token_forward_horizon"]).all(), "both values are kept to the end"
    size = sent["jacobian"].isel(batch=0).values
    assert size[0, 6] > 0.1, "the asked value moves the answer"
    assert size[1, 6] < 1e-12, "the other one was kept and is not read"


@pytest.mark.parametrize("level", ["1/e", "1/2"])
def test_s4d_has_constant_horizons_and_gains_nothing(level: str) -> None:
    with mp.attach(model_of("s4d", n_layers=2)) as probe:
        trace = probe.record(prompts())
    result = memory_horizon.measure(trace, level=level, tokens=range(LENGTH))
    horizon, least = (result[f"token_forward_horizon{end}"].values for end in ("", "_at_least"))
    exact = np.ceil(result["lti_horizon"].values * (1 - 1e-9))[:, None, None]
    left = np.arange(LENGTH, 0, -1)[:, None, None]
    np.testing.assert_array_equal(horizon, np.broadcast_to(np.where(exact < left, exact, np.inf), horizon.shape))
    assert 0 < np.isinf(horizon).mean() < 1
    assert (least <= left).all()
    gain = result["selectivity_gain"].values
    assert np.isfinite(gain).any()
    assert (gain[np.isfinite(gain)] == 1).all()
    known = result["layer_selectivity_gain"].values
    assert (known[~np.isnan(known)] == 1).all()
    decay = trace["A"].values.real.astype(float)
    equivalent = -np.log(np.exp(-1) if level == "1/e" else 0.5) / (-decay * trace["delta"].values[..., None])
    np.testing.assert_allclose(result["lti_horizon"], equivalent, rtol=1e-6)
    np.testing.assert_array_equal(result["layer_forward_survival"], result["layer_null_lti_survival"])


@pytest.mark.parametrize("mixer", ["mamba2", "s4d"])
def test_a_trace_on_disk_gives_the_same_answers(mixer: str, tmp_path) -> None:
    with mp.attach(model_of(mixer, n_layers=2)) as probe:
        trace = probe.record(prompts())
        jacobian = probe.jacobian(prompts(), layer=1, source_tokens=[4, 20], n_probes=2)
    lazy = mp.open_trace(trace.probe.save(tmp_path / "trace.zarr"))
    assert lazy["A"].chunks is not None
    given = {"tokens": [3, 30], "event_tokens": [9, 11], "mass": True, "jacobian": jacobian, "n_bootstrap": 5}
    xr.testing.assert_equal(memory_horizon.measure(lazy, **given), memory_horizon.measure(trace, **given))


def test_how_long_a_token_stays_above_its_peak() -> None:
    assert falls_for_good(np.array([1.0, 4.0, 1.0, 3.0, 1.0]), 0.5) == (4.0, False)
    assert falls_for_good(np.array([1.0, 0.1, 0.0]), 0.5) == (1.0, False)
    assert falls_for_good(np.array([1.0, 0.1, 0.6]), 0.5) == (3.0, True)
    assert np.isnan(falls_for_good(np.zeros(3), 0.5)[0])


@pytest.mark.parametrize("wrong", ["dims", "layer", "model", "prompt", "twice", "tokens"])
def test_a_jacobian_of_something_else_is_refused(wrong: str) -> None:
    with mp.attach(model_of("mamba1")) as probe:
        trace = probe.record(prompts())
        jacobian = probe.jacobian(prompts(), layer=0, source_tokens=[4], direction=np.ones(WIDTH))
        queried = probe.jacobian(prompts(), layer=0, query_tokens=[4], read_out=np.ones((1, WIDTH)))
    given = {
        "dims": (queried, r"got a Dataset over \('batch', 'query_token'"),
        "layer": (jacobian.assign_attrs(layer=3), r"jacobian is of layer 3; the trace has layers \[0\]"),
        "model": (jacobian.assign_attrs(model_hash="0"), "of another model than the trace"),
        "prompt": (jacobian.isel(token=slice(0, 20)), "of other prompts than the trace"),
        "twice": ([jacobian, jacobian], "holds layer 0 twice"),
        "tokens": ([jacobian, jacobian.assign_coords(source_token=[5])], "twice|same source_token"),
    }
    with pytest.raises(ValueError, match=given[wrong][1]):
        memory_horizon.measure(trace, jacobian=given[wrong][0])


def test_the_picture_of_tokens_shows_both_horizons() -> None:
    import matplotlib.pyplot as plt

    with mp.attach(model_of("mamba1")) as probe:
        trace = probe.record(prompts())
        jacobian = probe.jacobian(prompts(), layer=0, source_tokens=[4, 20], direction=np.ones(WIDTH))
    ax = memory_horizon.plot(memory_horizon.measure(trace, tokens=[4, 20, 39], jacobian=jacobian), kind="token")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert any("frozen" in label for label in labels)
    assert "Jacobian, selection moving" in labels
    assert any("null" in label for label in labels)
    assert ax.get_yscale() == "log"
    plt.close(ax.figure)


@pytest.mark.long
def test_a_million_tokens_cost_linear_time_and_bounded_memory() -> None:
    """One channel of 4 states at three lengths: the time of a token does not grow with their number."""
    import time
    import tracemalloc

    seconds, peaks = [], []
    for n_tokens in (2**17, 2**20):
        delta = np.exp(np.random.default_rng(0).normal(-4, 1, (1, 1, n_tokens, 1))).astype("float32")
        A = -np.arange(1.0, 5).astype("float32")[None, None]
        trace = xr.Dataset(
            {"delta": (("layer", "batch", "token", "channel"), delta), "A": (("layer", "channel", "state"), A)},
            {"layer": [0], "valid": (("batch", "token"), np.ones((1, n_tokens), bool)),
             "position": (("batch", "token"), np.arange(n_tokens)[None])},
            {"schema_version": 1, "family": "mamba"},
        )  # fmt: skip
        start = time.perf_counter()
        memory_horizon.measure(trace, event_tokens=n_tokens // 2)
        seconds.append((time.perf_counter() - start) / n_tokens)
        tracemalloc.start()
        memory_horizon.measure(trace.isel(token=slice(0, n_tokens)), tokens=[5])
        peaks.append(tracemalloc.get_traced_memory()[1] / n_tokens)
        tracemalloc.stop()
    assert seconds[1] < 2.5 * seconds[0]
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 600, "bytes a token: a few copies of a channel, whatever the number of channels and states"
