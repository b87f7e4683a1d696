"""Attribution is the derivative of a patched answer, and says how far it is from the exact one."""

import numpy as np
import pytest
import torch
from patched import AROUND, BASE, RUNS, SCAN, SOURCE, answer, double_model, perturbed, quiet
from scipy.stats import pearsonr, spearmanr

import mamba_probe as mp
from mamba_probe import patching
from mamba_probe.blocks import MambaBlock
from mamba_probe.hooks import HookPoint


def test_attribution_is_the_directional_derivative(family):
    """Central differences in float64 on the way from the base's entry to the source's."""
    tokens, layers = [2, 5, 8], (0, 1)
    model = double_model(family)
    with mp.attach(model) as probe:
        found = patching.attribute(probe, BASE, SOURCE, answer, quantities=(*SCAN, *AROUND), tokens=tokens)
        _, cache = probe.run_with_cache(SOURCE)
        step = 1e-5

        def moved(quantity, layer, token, by):
            bare = f"blocks.{layer}.{patching.QUANTITIES[quantity]}"
            aim = cache[bare][:, token]

            def towards(tensor, hook: HookPoint):
                if quantity == "h":
                    return tensor + by * (aim - tensor)
                changed = tensor.clone()
                changed[:, token] += by * (aim - tensor[:, token])
                return changed

            name = f"{bare}.{token}" if quantity == "h" else bare
            with torch.no_grad():
                return answer(probe.run_with_hooks(BASE, fwd_hooks=[(name, towards)])).numpy()

        for quantity in (*SCAN, *AROUND):
            for layer in layers:
                for token in tokens:
                    slope = moved(quantity, layer, token, step) - moved(quantity, layer, token, -step)
                    cell = found["attributed"].sel(quantity=quantity, layer=layer, token=token)
                    np.testing.assert_allclose(cell, slope / (2 * step), rtol=1e-6, atol=1e-8, err_msg=quantity)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_quantities_attributed_together_are_those_attributed_alone(family):
    """Those that shadow another too: delta passes through A_bar, x, B and C; the stream through everything."""
    with mp.attach(double_model(family)) as probe:
        every = (*SCAN, *AROUND)
        together = patching.attribute(probe, BASE, SOURCE, answer, quantities=every, tokens=[4, 8])
        for quantity in every:
            alone = patching.attribute(probe, BASE, SOURCE, answer, quantities=[quantity], tokens=[4, 8])
            np.testing.assert_allclose(
                alone["attributed"][0], together["attributed"].sel(quantity=quantity), rtol=1e-9, atol=1e-12
            )


def test_attribution_is_exact_where_the_metric_is_linear_in_the_quantity():
    """One Mamba-1 mixer: its output at a token is linear in C, y and h there; a write is linear in B and in x apart."""
    torch.manual_seed(0)
    mixer = perturbed(MambaBlock(8, d_state=4).double())
    generator = torch.Generator().manual_seed(1)
    base, source = (torch.randn(3, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    direction = torch.randn(8, generator=generator, dtype=torch.float64)

    def metric(out):
        return out[:, -1] @ direction

    linear = ("A_bar", "B", "C", "x", "y", "h")
    with mp.attach(mixer) as probe:
        exact = quiet(probe, base, source, metric, quantities=(*linear, "delta", "z"))
        found = patching.attribute(probe, base, source, metric, quantities=(*linear, "delta", "z"), exact=exact)
    change = exact["patched"] - exact["base"]
    of = {"quantity": list(linear)}
    np.testing.assert_allclose(found["attributed"].sel(of), change.sel(of), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["recovered"].sel(of), exact["recovered"].sel(of), rtol=1e-9, atol=1e-12)
    assert (found["error_max"].sel(of) < 1e-9).all()
    assert (found["sign_agreement"].sel(of) == 1).all()
    assert (found["error_max"].sel(quantity=["delta", "z"]) > 1e-3).all(), "these are not linear"


def test_a_decay_that_is_zero_has_its_slope_and_spoils_no_other():
    """The output at a token is linear in the decay there, also from 0, of which the scan takes the logarithm."""
    torch.manual_seed(0)
    block = perturbed(MambaBlock(8, d_state=4))
    with torch.no_grad():
        block.dt_proj.bias += 25.0
        block.A_log.fill_(2.0)
    generator = torch.Generator().manual_seed(1)
    base, source = (size * torch.randn(8, 6, 8, generator=generator) for size in (0.1, 100.0))

    def metric(out):
        return out[:, -1, 0]

    with mp.attach(block) as probe:
        decays = [float(probe.record(run, variables=["A_bar"])["A_bar"].max()) for run in (base, source)]
        exact = quiet(probe, base, source, metric, quantities=["A_bar"])
        alone = patching.attribute(probe, base, source, metric, quantities=["delta"])
        both = patching.attribute(probe, base, source, metric, quantities=["delta", "A_bar"])
    assert decays[0] == 0 < 0.1 < decays[1]
    change = (exact["patched"] - exact["base"])[0]
    assert float(abs(change).max()) > 1e-4
    np.testing.assert_allclose(both["attributed"].sel(quantity="A_bar"), change, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(both["attributed"].sel(quantity="delta"), alone["attributed"][0], rtol=1e-5, atol=1e-12)


def test_the_error_against_the_exact_is_what_it_says(model):
    with mp.attach(model) as probe:
        exact = quiet(probe)
        many = patching.attribute(probe, *RUNS, answer, exact=exact, tokens=[4, 6, 8], n_bootstrap=50)
        rows = [{name: each[1:] for name, each in run.items()} for run in RUNS]
        single = quiet(probe, *rows)
        cells = patching.attribute(probe, *rows, answer, exact=single, n_bootstrap=50)
    for quantity in patching.DEFAULT:
        one = many.sel(quantity=quantity)
        true = (exact["patched"] - exact["base"]).sel(quantity=quantity, token=[4, 6, 8])
        true, mine = (each.transpose("layer", "token", "batch").values.ravel() for each in (true, one["attributed"]))
        apart = np.abs(mine - true)
        np.testing.assert_allclose(one["error_max"], apart.max() / np.abs(true).max())
        np.testing.assert_allclose(one["error_rms"], np.sqrt((apart**2).sum() / (true**2).sum()))
        np.testing.assert_allclose(one["pearson"], pearsonr(mine, true)[0])
        np.testing.assert_allclose(one["spearman"], spearmanr(mine, true)[0])
        large = np.abs(true) >= 0.01 * np.abs(true).max()
        np.testing.assert_allclose(one["sign_agreement"], (mine * true > 0)[large].mean())
        ends = [cells[f"spearman{end}"].sel(quantity=quantity).item() for end in ("_low", "", "_high")]
        assert ends == sorted(ends)
        assert ends[0] < ends[2]
    assert "over rows" in many.attrs["interval"]
    assert "over cells" in cells.attrs["interval"]
    np.testing.assert_allclose(cells["exact"], single["patched"] - single["base"])
