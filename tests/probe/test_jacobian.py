"""Exact derivatives of a mixer: against finite differences in float64, both ways, and a closed form."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock


def prompt(length=14, padded=True):
    ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    return ids, mask


def by_differences(mixer, hidden, mask, step=1e-6):
    """J (batch, t, model_out, s, model_in) by central differences."""
    batch, length, width = hidden.shape
    found = np.zeros((batch, length, width, length, width))
    with torch.no_grad():
        for s in range(length):
            for i in range(width):
                moved = torch.zeros_like(hidden)
                moved[:, s, i] = step
                change = mixer(hidden + moved, attention_mask=mask) - mixer(hidden - moved, attention_mask=mask)
                found[:, :, :, s, i] = change.numpy() / (2 * step)
    return found


def inputs_of(model, layer, ids, mask):
    caught = []
    mixer = model.backbone.layers[layer].mixer
    handle = mixer.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, attention_mask=mask)
    handle.remove()
    return caught[0]


BLOCKS = {
    "mamba1": lambda: MambaBlock(8, d_state=4),
    "mamba2": lambda: Mamba2Block(8, n_heads=4, d_state=4, n_groups=2),
    "s4d": lambda: S4DBlock(8, d_state=4),
}


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_both_directions_agree_with_finite_differences(kind):
    """Our own blocks, which are float64 throughout: transformers' gated norm rounds to float32."""
    torch.manual_seed(0)
    model = LanguageModel([BLOCKS[kind](), BLOCKS[kind]()], vocab_size=61).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    ids, mask = prompt()
    with mp.attach(model) as probe:
        hidden = inputs_of(model, 1, ids, mask)
        exact = by_differences(model.backbone.layers[1].mixer, hidden, mask)
        pulled = probe.jacobian(ids, mask, layer=1, query_tokens=[2, 9])["jacobian"]
        pushed = probe.jacobian(ids, mask, layer=1, source_tokens=[1, 6])["jacobian"]
        along = np.linspace(-1, 1, 8)
        rows = np.arange(16.0).reshape(2, 8) - 7
        read = probe.jacobian(ids, mask, layer=1, query_tokens=[9], read_out=rows, direction=along)["jacobian"]
        sent = probe.jacobian(ids, mask, layer=1, source_tokens=[6], read_out=rows, direction=along)["jacobian"]
    scale = np.abs(exact).max()
    for row, first in enumerate((4, 0)):
        seen = slice(first, None)
        for t in (2, 9):
            want = np.linalg.norm(exact[row, first + t], axis=-1)
            assert np.abs(pulled.sel(query_token=t).values[row] - want)[:, seen].max() < 1e-6 * scale
        for s in (1, 6):
            want = np.sqrt((exact[row, :, :, first + s] ** 2).sum((1, 2)))
            assert np.abs(pushed.sel(source_token=s).values[row] - want)[seen].max() < 1e-6 * scale
        want = np.einsum("km,msi,i->ks", rows, exact[row, first + 9], along)
        assert np.abs(read.values[row, 0] - want)[:, seen].max() < 1e-6 * np.abs(want).max()
        want = np.linalg.norm(np.einsum("km,tmi,i->tk", rows, exact[row, :, :, first + 6], along), axis=1)
        assert np.abs(sent.values[row, 0] - want)[seen].max() < 1e-6 * np.abs(want).max()
    assert np.isnan(pulled.values[0, ..., :4]).all()
    assert np.isnan(pushed.values[0, :, :4]).all()


def test_random_probes_estimate_the_norm(build):
    ids, mask = prompt()
    with mp.attach(build()) as probe:
        exact = probe.jacobian(ids, mask, layer=0, source_tokens=[3])["jacobian"]
        few = [probe.jacobian(ids, mask, layer=0, source_tokens=[3], n_probes=8, seed=s)["jacobian"] for s in range(8)]
    squares = np.stack([estimate.values**2 for estimate in few])
    mean, spread = squares.mean(0), squares.std(0) / np.sqrt(len(squares))
    seen = exact.values > 0
    assert (np.abs(mean - exact.values**2)[seen] < 5 * spread[seen] + 1e-9).all()


def test_the_block_kernel_of_haar_flat_b_is_the_haar_basis():
    """The signal enters through B, where a kernel with frozen selection sees nothing of it."""
    construction = mp.constructions.haar(length=32, levels=2, variant="flat-B", dtype=torch.float64)
    u = np.random.default_rng(0).standard_normal((1, 32))
    with mp.attach(construction.model) as probe:
        found = probe.jacobian(
            construction.inputs(u), layer=0, query_tokens=[31], read_out=np.eye(4), direction=[1.0, 0, 0, 0]
        )["jacobian"].values[0, 0]
    step = np.repeat([1.0, -1.0], 8)
    basis = np.stack([np.ones(32), np.r_[np.ones(16), -np.ones(16)], np.r_[step, 0 * step], np.r_[0 * step, step]])
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    assert np.abs(found - basis).max() < 1e-12


def test_tensors_arrays_and_switched_off_gradients_are_taken_as_they_come(build):
    ids, _ = prompt()
    model = build()
    with mp.attach(model) as probe:
        rows = model.lm_head.weight[:2]
        plain = probe.jacobian(ids, layer=0, query_tokens=[3, 4], read_out=rows)["jacobian"]
        for off in (torch.no_grad(), torch.inference_mode()):
            with off:
                again = probe.jacobian(ids, layer=0, query_tokens=np.array([3, 4]), read_out=rows)["jacobian"]
                np.testing.assert_array_equal(again.values, plain.values)
        assert probe.jacobian(ids, layer=0, source_tokens=np.array([3, 4]))["source_token"].values.tolist() == [3, 4]


def test_wrong_requests_are_refused(build):
    ids, mask = prompt()
    with mp.attach(build()) as probe:
        with pytest.raises(ValueError, match=r"either query_tokens .* or source_tokens .*, and not both"):
            probe.jacobian(ids, layer=0)
        with pytest.raises(ValueError, match=r"query_tokens must lie in 0 \.\. 9, the shortest row's positions"):
            probe.jacobian(ids, mask, layer=0, query_tokens=[10])
        with pytest.raises(ValueError, match="unknown layer 7"):
            probe.jacobian(ids, layer=7, query_tokens=[1])
        with pytest.raises(
            ValueError, match=r"read_out needs finite values over model = 24 features; got shape \(1, 3\)"
        ):
            probe.jacobian(ids, layer=0, query_tokens=[1], read_out=np.ones((1, 3)))
        with pytest.raises(ValueError, match=r"n_probes is at least 1 and a whole number; got 0"):
            probe.jacobian(ids, layer=0, source_tokens=[1], n_probes=0)
        with pytest.raises(ValueError, match=r"n_probes .* goes with source_tokens and no direction"):
            probe.jacobian(ids, layer=0, query_tokens=[1], n_probes=4)
        with (
            probe.recording(variables=["delta"]),
            pytest.raises(ValueError, match="a recording is open on this probe"),
        ):
            probe.jacobian(ids, layer=0, query_tokens=[1])
        with probe.edit(mp.ablate("conv")), pytest.raises(ValueError, match="starts from the unedited probe"):
            probe.jacobian(ids, layer=0, query_tokens=[1])
