"""Recording `generate()`: beams, rows that end early, padding; and a step that costs what the first one did."""

import copy
import gc
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from torch.utils._python_dispatch import TorchDispatchMode

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon
from mamba_probe.generating import Ended
from mamba_probe.lineage import fingerprint, parents
from mamba_probe.trace import require

VARIABLES = ("delta", "B", "C", "h", "delta_cumsum")
NO_LIMITS = (0.0, float("inf"))
IDS = torch.randint(1, 61, (3, 9), generator=torch.Generator().manual_seed(9))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
GREEDY = {"do_sample": False, "attention_mask": MASK, "pad_token_id": 0}
BEAMS = {
    "num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 9, "attention_mask": MASK, "pad_token_id": 0,
    "eos_token_id": list(range(5, 14)), "early_stopping": True,
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
}  # fmt: skip


def perturbed(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter += torch.randn(parameter.shape, generator=generator) * (0.1 if name.endswith("A_log") else 0.2)
    return model.eval()


def jamba():
    from transformers import JambaConfig, JambaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_experts": 1}
    sizes |= {"mamba_d_state": 8, "mamba_dt_rank": 3, "num_key_value_heads": 2, "intermediate_size": 32}
    return perturbed(JambaForCausalLM(JambaConfig(**sizes, attn_layer_period=3, attn_layer_offset=1)))


def bamba():
    from transformers import BambaConfig, BambaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"mamba_d_state": 8, "mamba_n_heads": 6, "num_key_value_heads": 2, "intermediate_size": 32}
    return perturbed(BambaForCausalLM(BambaConfig(**sizes, attn_layer_indices=[1], mamba_chunk_size=16)))


@pytest.fixture
def own(build, family):
    """Mamba-2's decoding does not clamp delta, as the library's: here that makes no difference."""
    model = build() if family == "mamba" else build(time_step_limit=NO_LIMITS)
    model.generation_config.eos_token_id = None
    return model


def recorded(model, ids=IDS, variables=VARIABLES, **options):
    """What `generate` gave, and the trace of it."""
    keep = {name: options.pop(name) for name in ("keep", "store") if name in options}
    with mp.attach(model) as probe, probe.recording(variables=variables, **keep) as recorder:
        produced = model.generate(ids, **options)
    return produced, recorder.dataset


def assert_same(trace, whole, tolerance=1e-5):
    """Everything at the valid tokens of `trace` is what a forward over the whole sequences made."""
    valid = trace["valid"].values
    whole = whole.isel(token=slice(trace.sizes["token"]))
    assert valid.sum() > len(valid)
    for name in VARIABLES:
        a, b = trace[name].values, whole[name].values
        assert np.isnan(a[:, ~valid]).all(), name
        assert abs(a[:, valid] - b[:, valid]).max() <= tolerance * abs(b[:, valid]).max(), name
    for name in ("token_id", "position", "valid"):
        assert (trace[name].values[valid] == whole[name].values[valid]).all(), name


def forward(model, sequences, mask=MASK):
    """The trace of one forward over whole sequences."""
    rows = mask.repeat_interleave(len(sequences) // len(mask), 0)
    mask = torch.cat([rows, torch.ones(len(sequences), sequences.shape[1] - rows.shape[1], dtype=torch.long)], 1)
    with mp.attach(model) as probe:
        return probe.record(sequences, mask, variables=VARIABLES)


@pytest.mark.parametrize("hybrid", [False, True])
def test_every_beam_is_a_sequence_and_its_history_is_its_own(own, family, hybrid):
    model = {"mamba": jamba, "mamba2": bamba}[family]() if hybrid else own
    native = model.generate(IDS, **BEAMS)
    out, trace = recorded(model, **BEAMS)
    assert (out.sequences == native.sequences).all()
    assert (trace["parent_row"] != trace["prompt_id"]).sum() > 10
    assert_same(trace.probe.unrolled(out.sequences), forward(model, out.sequences))
    check_parents(trace, out.beam_indices)


def check_parents(trace, beam_indices):
    """Against generate()'s own list of the row that each token was drawn from."""
    parent, n_prompt = trace["parent_row"].values, IDS.shape[1]
    for drawn_from in beam_indices.numpy():
        drawn_from = drawn_from[drawn_from >= 0]
        for step in range(2, len(drawn_from)):  # a prompt's rows are equal at first: any of them is the parent
            assert parent[drawn_from[step], n_prompt + step - 1] == drawn_from[step - 1]
        assert (parent[drawn_from[1:2], n_prompt] // 4 == drawn_from[:1] // 4).all()


def test_running_beams_and_a_model_whose_cache_is_narrower_than_the_scan(own):
    options = BEAMS | {"eos_token_id": None, "num_return_sequences": 4}
    out, trace = recorded(own, **options)
    running = trace.probe.unrolled()
    assert running["prompt_id"].values.tolist() == list(range(12))
    assert_same(running, forward(own, torch.tensor(running["token_id"].values)))
    assert "parent_row" not in running.coords
    assert running["delta"].dims == trace["delta"].dims
    assert running.attrs == trace.attrs
    returned = trace.probe.unrolled(out.sequences)
    assert (returned["token_id"].values == out.sequences[:, :-1].numpy()).all()
    out, trace = recorded(own.bfloat16(), **options)
    check_parents(trace, out.beam_indices)


@pytest.mark.parametrize("family", ["mamba", pytest.param("mamba2", marks=pytest.mark.long)], indirect=True)
def test_an_analysis_refuses_rows_that_are_no_sequences(own, tmp_path):
    out, trace = recorded(own, variables=("delta", "A"), store=tmp_path / "beams.zarr", **BEAMS)
    stored = mp.open_trace(tmp_path / "beams.zarr")
    for each in (trace, stored):
        with pytest.raises(ValueError, match=r"reordered while it was recorded.*trace.probe.unrolled\(ids\)"):
            memory_horizon.measure(each)
    memory_horizon.measure(trace.isel(token=slice(IDS.shape[1])))
    xr.testing.assert_identical(stored.probe.unrolled(out.sequences).load(), trace.probe.unrolled(out.sequences))
    memory_horizon.measure(trace.probe.unrolled(out.sequences))


def test_what_cannot_be_unrolled_is_refused(own):
    out, trace = recorded(own, variables=("delta",), **BEAMS)
    with pytest.raises(ValueError, match=r"row \d+ continues row \d+ at token \d+, and this selection has no such row"):
        trace.isel(batch=[1, 5, 11]).probe.unrolled()
    with pytest.raises(ValueError, match=r"put together of several, whose rows share a `prompt_id`"):
        xr.concat([trace, trace], "batch").probe.unrolled()
    with pytest.raises(ValueError, match=r"lacks `prompt_id`"):
        require(trace.drop_vars("prompt_id"), "delta")
    with pytest.raises(ValueError, match=r"lacks `parent_row`"):
        trace.probe.unrolled().probe.unrolled()
    with pytest.raises(ValueError, match=r"sequence 1 was not recorded: no row went on with id 60 at token 2"):
        trace.probe.unrolled([IDS[0].tolist(), [*IDS[1, :2].tolist(), 60, 1, 2, 3, 4, 5, 6]])
    with pytest.raises(ValueError, match=r"integer ids \(sequence, token\); got int64 of shape \(9,\)"):
        trace.probe.unrolled(IDS[0])
    with mp.attach(own) as probe, probe.recording(variables=["delta"]) as recorder:
        for _ in range(2):
            own.generate(IDS, **BEAMS)
    both = recorder.dataset
    with pytest.raises(ValueError, match=r"sequence 0 was recorded in several calls, \[0, \d+\]"):
        both.probe.unrolled(out.sequences)
    second = both.isel(batch=both["call"] > 0)
    np.testing.assert_array_equal(
        second.probe.unrolled(out.sequences)["delta"], trace.probe.unrolled(out.sequences)["delta"]
    )


def test_another_prompts_cache_and_dropped_rows_are_refused(own):
    with mp.attach(own) as probe, probe.recording(variables=["delta"], keep="device") as recorder, torch.no_grad():
        first = own(IDS, use_cache=True).cache_params
        second = own(IDS.flip(1), attention_mask=MASK, use_cache=True).cache_params
        with pytest.raises(ValueError, match=r"state that row 0 of this step carries in was left by no row"):
            own(IDS[:, :1], cache_params=first)
        own(IDS[:, :1], cache_params=second)
        second.reorder_cache(torch.tensor([2, 0, 0]))
        own(IDS[:, :1], cache_params=second)
        own(IDS[:, :1], cache_params=second)
        second.reorder_cache(torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"a call with 2 rows continues a recording of 3"):
            own(IDS[:2, :1], cache_params=second)
    trace = recorder.dataset
    assert trace["parent_row"].values[:, -2].tolist() == [-1, -1, -1, 5, 3, 3]
    assert trace["position"].values[3:, -3:].tolist() == [[5, 10, 11], [9, 6, 7], [9, 6, 7]]
    assert not any(rows.states or rows.sums for rows in recorder._blocks), "nothing is held that no step will need"
    assert trace["call"].values.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_parents_are_those_of_any_reordering(dtype):
    generator = torch.Generator().manual_seed(3)
    left = [torch.randn(6, 4, 3, 5, generator=generator).to(dtype) for _ in range(3)]
    order = torch.tensor([3, 3, 0, 5, 4, 1])
    assert parents([fingerprint(each[order]) for each in left], list(map(fingerprint, left))).tolist() == order.tolist()
    for each in left:  # rows 0 and 3 part in one layer only
        each[3] = each[0]
    left[1][3, 0, 0, 0] *= -1
    came = [each[order] for each in left]
    assert parents(list(map(fingerprint, came)), list(map(fingerprint, left))).tolist() == order.tolist()
    assert parents(list(map(fingerprint, left[:1])), list(map(fingerprint, left[:1]))).tolist() == list(range(6))
    assert parents([torch.tensor([5, 7, 7])], [torch.tensor([7, 5, 7])]).tolist() == [1, 0, 2], "itself, then the first"


def test_a_cache_may_keep_the_states_narrower_than_the_scan(own):
    with mp.attach(own) as probe, probe.recording(variables=["delta"]) as recorder, torch.no_grad():
        cache = own(IDS, use_cache=True).cache_params
        for layer in cache.layers:
            layer.recurrent_states[0] = layer.recurrent_states[0].bfloat16()
        cache.reorder_cache(torch.tensor([1, 2, 1]))
        for _ in range(2):
            own(IDS[:, :1], cache_params=cache)
    assert recorder.dataset["parent_row"].values[:, -2:].tolist() == [[1, 0], [2, 1], [1, 2]]


# -- rows that end --------------------------------------------------------------------------------------------------


def ending(model):
    """A token that greedy decoding draws in one row while the others go on, and what it produces without an end."""
    free = model.generate(IDS, **GREEDY | {"max_new_tokens": 10})
    made = free[:, IDS.shape[1] :].tolist()
    for step in range(1, 6):
        for row in (2, 1, 0):
            eos = made[row][step]
            firsts = [other.index(eos) if eos in other else 10 for other in made]
            if firsts[row] == step and min(firsts[:row] + firsts[row + 1 :]) > step + 2:
                return eos, free, firsts
    raise AssertionError("no such token: choose another seed")


@pytest.mark.parametrize("where", ["argument", "configuration", "model", "several", "pad is eos", "no cache"])
def test_padding_after_the_end_is_no_token(own, where):
    eos, _, firsts = ending(own)
    options = GREEDY | {"max_new_tokens": 10}
    if where == "configuration":
        config = copy.deepcopy(own.generation_config)
        config.update(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=eos)
        options = {"generation_config": config, "attention_mask": MASK}
    elif where == "model":
        own.generation_config.eos_token_id = eos
    else:
        options |= {"eos_token_id": [60, eos] if where == "several" else eos}
    if where == "pad is eos":
        options |= {"pad_token_id": eos}
    if where == "no cache":
        options |= {"use_cache": False}
    ids = IDS.clone()
    ids[(np.argmin(firsts) + 1) % 3, 5] = eos  # within a prompt it ends nothing
    native = own.generate(ids, **options)
    produced, trace = recorded(own, ids, **options)
    assert (produced == native).all()
    if where == "no cache":  # every step a whole forward
        trace = trace.isel(batch=slice(-3, None)).drop_vars("parent_row")
    made = produced[:, ids.shape[1] :].numpy()
    ends = np.isin(made, [60, eos] if where == "several" else eos)
    until = np.where(ends.any(1), ends.argmax(1), 10)
    expected = np.arange(trace.sizes["token"]) <= until[:, None] + ids.shape[1]
    expected[0, :4] = False
    assert (trace["valid"].values == expected).all()
    assert (trace["phase"].values[~expected] == "").all()
    assert (trace["position"].values[~expected] == -1).all()
    assert (~expected[:, ids.shape[1] :]).sum() > 0
    assert_same(trace, forward(own, produced))


def test_a_loop_of_the_users_own_is_taken_as_it_is(own):
    """The same ids after the same end, fed by hand: nobody said that they are padding."""
    eos, _, _ = ending(own)
    produced, trace = recorded(own, **GREEDY | {"max_new_tokens": 10, "eos_token_id": eos})
    own.generation_config.eos_token_id = eos
    with mp.attach(own) as probe, probe.recording(variables=VARIABLES) as recorder, torch.no_grad():
        cache = own(IDS, attention_mask=MASK, use_cache=True).cache_params
        for token in range(IDS.shape[1], trace.sizes["token"]):
            own(produced[:, token : token + 1], cache_params=cache)
    by_hand = recorder.dataset
    assert by_hand["valid"].values[:, IDS.shape[1] :].all()
    assert by_hand["valid"].sum() > trace["valid"].sum()
    same = trace["valid"].values
    np.testing.assert_array_equal(by_hand["h"].values[:, same], trace["h"].values[:, same])
    assert "generate" not in vars(own)


def test_an_end_drawn_right_after_embedded_prompts_and_a_row_that_goes_on(own):
    eos, free, _ = ending(own)
    embedded = own.get_input_embeddings()(IDS).detach()
    options = GREEDY | {"max_new_tokens": 5, "eos_token_id": int(free[1, IDS.shape[1]]), "inputs_embeds": embedded}
    _, trace = recorded(own, None, variables=("delta",), **options)
    assert trace["valid"].values[1].tolist() == [True] * 10 + [False] * (trace.sizes["token"] - 10)
    ended = Ended((eos,), 0)
    fed = [np.array([[eos], [eos]]), np.array([[0], [7]]), np.array([[0], [0]])]
    ended.padding(np.array([[1, 2], [3, 4]]), None)
    found = np.concatenate([ended.padding(ids, np.array([0, 1])) for ids in fed], axis=1)
    assert found.tolist() == [[False, True, True], [False, False, False]]
    turned = ended.padding(np.array([[0], [0]]), np.array([1, 0]))
    assert turned.tolist() == [[False], [True]], "a row's end goes with it"


def test_what_else_may_end_a_row_is_warned_of_and_a_copy_generates_for_itself(own):
    from transformers import MaxTimeCriteria, StoppingCriteriaList

    options = GREEDY | {"max_new_tokens": 3, "eos_token_id": 60}
    timed = options | {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1e6)])}
    with pytest.warns(UserWarning, match=r"a row that stopping_criteria ends is fed padding"):
        recorded(own, **timed)
    recorded(own, IDS[:1], **timed | {"attention_mask": MASK[:1]})
    with mp.attach(own) as probe, probe.recording(variables=["delta"]) as recorder:
        twin = copy.deepcopy(own)
        twin.lm_head.weight.data.neg_()
        copied = twin.generate(IDS, **options)
        produced = own.generate(IDS, **options)
    assert recorder.n_calls == 3
    assert (copied != produced).any()


# -- alignment ------------------------------------------------------------------------------------------------------


def test_sampling_and_single_tokens_and_two_calls_in_one_recording(own):
    sampled = {"do_sample": True, "top_k": 20, "max_new_tokens": 7, "attention_mask": MASK, "pad_token_id": 0}
    torch.manual_seed(4)
    expected = own.generate(IDS, **sampled)
    with mp.attach(own) as probe, probe.recording(variables=VARIABLES) as recorder:
        torch.manual_seed(4)
        produced = own.generate(IDS, **sampled)
        again = own.generate(IDS[:2], **GREEDY | {"max_new_tokens": 1, "attention_mask": None})
    trace = recorder.dataset
    assert (produced == expected).all()
    assert again.shape == (2, 10)
    assert trace["call"].values.tolist() == [0, 0, 0, 7, 7]
    assert_same(trace.isel(batch=slice(3)), forward(own, produced))
    assert trace["valid"].values[3:].sum(1).tolist() == [9, 9]
    assert (trace["parent_row"].values[3:, :9] == [[3], [4]]).all()
    assert (trace["prediction"].values[3:, 8] == again[:, 9].numpy()).all()
    assert np.isnan(trace["h"].values[:, 3:, 9:]).all()


def test_on_the_device_and_in_a_store_it_is_the_same_trace(own, tmp_path):
    options = BEAMS | {"num_return_sequences": 2}
    _, host = recorded(own, store=tmp_path / "run.nc", **options)
    _, device = recorded(own, keep="device", **options)
    xr.testing.assert_identical(host.drop_attrs(), device.drop_attrs())
    xr.testing.assert_identical(mp.open_trace(tmp_path / "run.nc").load(), host)


# -- cost -----------------------------------------------------------------------------------------------------------


class Elements(TorchDispatchMode):
    """Counts operations, and the elements that they take."""

    def __init__(self):
        super().__init__()
        self.operations, self.elements = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        taken = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else [arg])]
        self.elements += sum(each.numel() for each in taken if isinstance(each, torch.Tensor))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("keep", ["host", "device"])
def test_a_late_step_does_what_an_early_one_does(own, keep):
    calls = []

    def count(_frame, event, _argument):
        if event in ("call", "c_call"):
            calls.append(event)

    costs = {}
    with mp.attach(own) as probe, torch.no_grad(), probe.recording(variables=VARIABLES, keep=keep):
        cache = own(IDS, use_cache=True).cache_params
        for step in range(1, 201):
            if step not in (10, 20, 200):  # at 10, what is only done once is
                own(IDS[:, :1], cache_params=cache)
                continue
            calls.clear()
            gc.disable()  # a collection's callbacks (hypothesis sets one) are calls too, and come when they like
            with Elements() as ops:
                sys.setprofile(count)
                own(IDS[:, :1], cache_params=cache)
                sys.setprofile(None)
            gc.enable()
            costs[step] = (len(calls), ops.operations, ops.elements)
    assert costs[20] == costs[200]
    assert min(costs[20]) > 100
