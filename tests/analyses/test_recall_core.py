"""The arrays of the recall circuit against brute force: a sequential block, explicit loops, scipy's intervals."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mamba_probe.analyses.common import runs
from mamba_probe.analyses.common.proportion import causal_share, wilson
from mamba_probe.analyses.recall_circuit.core import (
    Prompt,
    Questions,
    contribution,
    gate_energy,
    gated_output,
    identity_error,
    log_delta_contrast,
    mean_log_delta,
    norm_scale,
    readout,
    relative_tap,
    silu,
    tap_mass,
    write_energy,
)
from mamba_probe.analyses.recall_circuit.reading import Answer, read_answers, read_sums, survey
from mamba_probe.analyses.recall_circuit.tally import match, pair_scores, tally

TOKENS, HEADS, CHANNELS, GROUPS, STATES, MODEL = 11, 4, 3, 2, 5, 7


def draw(seed: int, shared_decay: bool) -> tuple[Prompt, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    delta = rng.uniform(0.01, 1.0, (TOKENS, HEADS))
    A = -rng.uniform(0.1, 2.0, (HEADS, 1 if shared_decay else STATES))
    B, C = rng.normal(size=(2, TOKENS, GROUPS, STATES))
    x, z = rng.normal(size=(2, TOKENS, HEADS, CHANNELS))
    prompt = Prompt(delta, np.cumsum(delta, axis=0), A, B, C, x, z)
    return prompt, rng.normal(size=(MODEL, HEADS, CHANNELS)), rng.normal(size=HEADS)


@dataclass(frozen=True)
class Held:
    """A prompt that goes by in runs of some tokens."""

    prompt: Prompt
    most: int = TOKENS

    @property
    def size(self):
        return len(self.prompt.delta)

    def prompts(self):
        for at in runs(self.size, (), self.most):
            p = self.prompt
            parts = (p.delta[at], p.cumulative[at], p.A, p.B[at], p.C[at], p.x[at], p.z[at])
            yield at, Prompt(*parts)

    def runs(self, until):
        yield from ((at, prompt.run) for at, prompt in self.prompts() if at.start < until)


def gated(prompt: Prompt, skip: np.ndarray, query: int, most: int = TOKENS) -> np.ndarray:
    reader = prompt.reader(query)
    return gated_output(read_sums(Held(prompt, most), np.array([query]), [reader])[0], reader, skip)


def tallied(prompt: Prompt, read: np.ndarray, energy: np.ndarray, asked: Questions, offsets, scale, most: int = TOKENS):
    tokens = Held(prompt, most)
    return tally(tokens, survey(tokens, asked, offsets, energy), read, asked, offsets, scale)


def sequential(prompt: Prompt, out_proj: np.ndarray, skip: np.ndarray) -> np.ndarray:
    """The block as it runs: one step after the other, one state per head and channel."""
    h, out = np.zeros((HEADS, CHANNELS, STATES)), []
    for t in range(TOKENS):
        B, C = (np.repeat(array[t], HEADS // GROUPS, axis=0) for array in (prompt.B, prompt.C))
        delta = prompt.delta[t][:, None, None]
        h = np.exp(delta * prompt.A[:, None]) * h + delta * prompt.x[t][..., None] * B[:, None]
        y = (h * C[:, None]).sum(-1) + skip[:, None] * prompt.x[t]
        out.append(np.einsum("mhp,hp->m", out_proj, y * prompt.z[t] / (1 + np.exp(-prompt.z[t]))))
    return np.array(out)


@pytest.mark.parametrize("shared_decay", [False, True], ids=["mamba", "mamba2"])
@pytest.mark.parametrize("query", [0, 1, TOKENS - 1])
def test_contributions_and_skip_sum_to_the_mixer_output(shared_decay: bool, query: int):
    prompt, out_proj, skip = draw(query, shared_decay)
    truth = sequential(prompt, out_proj, skip)[query]
    found = gated(prompt, skip, query)
    assert np.abs(np.einsum("mhp,hp->m", out_proj, found) - truth).max() <= 1e-12 * max(1.0, np.abs(truth).max())
    assert identity_error(found, out_proj, truth, 0) < 1e-12
    np.testing.assert_allclose(gated(prompt, skip, query, most=3), found, rtol=1e-12)
    assert identity_error(found, out_proj, truth + 1.0, 0) == pytest.approx(1 / np.abs(truth + 1.0).max())


def test_behind_a_gated_norm_the_identity_holds_up_to_a_scale_per_group():
    prompt, out_proj, skip = draw(2, True)
    found = gated(prompt, skip, 9)
    normed = np.concatenate([part / np.sqrt((part**2).mean()) for part in (found[:2], found[2:])])
    assert np.abs(norm_scale(found, 2)[:, None] * found - normed).max() < 1e-14
    out = np.einsum("mhp,hp->m", out_proj, normed)
    assert identity_error(found, out_proj, out, 2) < 1e-12 < 1e-3 < identity_error(found, out_proj, out, 1)
    assert norm_scale(np.zeros((4, 3)), 2).tolist() == [1.0] * 4


def test_a_contribution_is_what_removing_the_source_takes_away():
    prompt, out_proj, skip = draw(3, False)
    x = prompt.x.copy()
    x[4] = 0.0
    cut = Prompt(prompt.delta, prompt.cumulative, prompt.A, prompt.B, prompt.C, x, prompt.z)
    lost = sequential(prompt, out_proj, skip)[-1] - sequential(cut, out_proj, skip)[-1]
    given = np.einsum("mhp,hp->m", out_proj, contribution(prompt, TOKENS - 1, np.array([4]))[0])
    assert np.abs(lost - given).max() < 1e-12


def test_readout_is_centred_and_linear():
    rng = np.random.default_rng(0)
    out_proj, unembedding, norm = rng.normal(size=(MODEL, 2, 3)), rng.normal(size=(4, MODEL)), rng.normal(size=MODEL)
    read, vector = readout(unembedding, norm, out_proj), rng.normal(size=(2, 3))
    logits = unembedding @ (norm * np.einsum("mhp,hp->m", out_proj, vector))
    assert np.abs(np.einsum("vhp,hp->v", read, vector) - (logits - logits.mean())).max() < 1e-12


def test_answers_agree_with_loops():
    """S1, S2, S3 and S4 of one query against a loop over sources, values, heads, channels and states."""
    hits = []
    for seed in range(20):
        prompt, out_proj, _ = draw(seed, False)
        rng = np.random.default_rng(seed)
        read = readout(rng.normal(size=(3, MODEL)), np.ones(MODEL), out_proj)
        scale, pairs, query = rng.uniform(0.1, 9, HEADS), np.array([1, 3, 5]), 9
        logit, unfaded = (looped(prompt, read, query, scale, faded) for faded in (True, False))
        asked = Answer(query, 3, 2, scale, read, prompt.reader(query))
        answers = read_answers(Held(prompt), [asked], (0,))[0].shares
        np.testing.assert_allclose(answers, logit[:, 2], rtol=1e-10)
        expected = (float(logit[pairs, 2].argmax() == 1), float(logit[3].argmax() == 2))
        assert pair_scores(answers, logit[3], asked, pairs, 3) == expected
        hits.append(expected)
        one = Questions(np.array([query]), np.array([3]), np.array([2]), pairs, np.ones(TOKENS, bool))
        totals = tallied(prompt, read, (out_proj**2).sum(axis=0), one, (0, 1, 2), scale[None]).totals[:, 0]
        found = totals[..., 0] / totals[..., 1]
        share = np.abs(logit[:, 2]) / np.abs(logit[:, 2]).sum()
        for offset in range(3):
            kept = np.linalg.norm(logit[3 + offset]) / np.linalg.norm(unfaded[3 + offset])
            assert found[offset, [1, 2, 4]] == pytest.approx([share[3 + offset], share[3] + share[4], kept], rel=1e-10)
    assert {True, False} == {bool(pair) for pair, _ in hits} == {bool(value) for _, value in hits}


def looped(prompt: Prompt, read: np.ndarray, query: int, scale: np.ndarray, faded: bool) -> np.ndarray:
    """L_{t,s}[v] by the formula, one term at a time."""
    logit = np.zeros((query + 1, len(read)))
    for s, v, h, p, n in np.ndindex(query + 1, len(read), HEADS, CHANNELS, STATES):
        group = h // (HEADS // GROUPS)
        decay = np.exp(prompt.A[h, n] * prompt.delta[s + 1 : query + 1, h].sum()) if faded else 1.0
        kernel = prompt.C[query, group, n] * prompt.B[s, group, n] * decay * prompt.delta[s, h]
        gate = prompt.z[query, h, p] / (1 + np.exp(-prompt.z[query, h, p]))
        logit[s, v] += read[v, h, p] * scale[h] * gate * prompt.x[s, h, p] * kernel
    return logit


def test_match_agrees_with_loops():
    rng = np.random.default_rng(1)
    C, B = rng.normal(size=(GROUPS, STATES)), rng.normal(size=(6, GROUPS, STATES))
    products = [float((C * b).sum()) for b in B]
    scale = np.sqrt((C**2).sum()) * max(np.sqrt((b**2).sum()) for b in B)
    margins = [products[i] - max(p for j, p in enumerate(products) if j != i) for i in range(6)]
    for i in range(6):
        margin, found, null = match(C, B, i)
        assert margin == pytest.approx(margins[i] / scale, abs=1e-14)
        assert found == float(products[i] == max(products))
        assert null == pytest.approx(np.mean(margins) / scale, abs=1e-14)


def test_a_write_after_the_query_matches_nothing():
    margin, found, _ = match(np.array([[1.0, 0.0]]), np.eye(2)[:, None], None)
    assert (margin, found) == (-1.0, 0.0)


def test_ties_are_wrong():
    assert match(np.zeros((1, 2)), np.zeros((3, 1, 2)), 0) == (0.0, 0.0, 0.0)
    assert match(np.ones((1, 2)), np.ones((3, 1, 2)), 0)[1] == 0.0


def test_energies_agree_with_loops():
    prompt, out_proj, _ = draw(5, True)
    column = (out_proj**2).sum(axis=0)
    write, gate = np.zeros(TOKENS), np.zeros(TOKENS)
    for t, h, p in np.ndindex(TOKENS, HEADS, CHANNELS):
        size = (prompt.B[t, h // (HEADS // GROUPS)] ** 2).sum()
        write[t] += column[h, p] * (prompt.delta[t, h] * prompt.x[t, h, p]) ** 2 * size
        gate[t] += column[h, p] * silu(prompt.z[t, h, p]) ** 2
    assert np.abs(write_energy(prompt, column) - write).max() < 1e-10
    assert np.abs(gate_energy(prompt, column) - gate).max() < 1e-10


def test_log_delta_contrast_of_a_zero_step_is_finite_and_of_no_step_undefined():
    delta = np.array([[1.0], [0.0]])
    assert log_delta_contrast(mean_log_delta(delta), np.array([True, False])) == pytest.approx(
        -np.log(np.finfo(np.float32).tiny)
    )
    assert np.isnan(log_delta_contrast(mean_log_delta(delta), np.array([True, True])))


def test_tap_masses_weigh_channels_by_their_readers():
    conv = np.array([[3.0, 0.0], [0.0, 1.0]])
    assert tap_mass(conv, np.array([1.0, 9.0])).tolist() == [0.5, 0.5]
    assert relative_tap(np.array([0, 0, 1.0, 0]), np.array([0, 1.0, 0, 0])) == 1.0
    assert relative_tap(np.array([1.0, 0, 0, 0]), np.array([1.0, 0, 0, 0])) == 0.0


def test_tally_adds_up_over_queries():
    prompt, out_proj, _ = draw(8, False)
    read, energy = readout(np.eye(3, MODEL), np.ones(MODEL), out_proj), (out_proj**2).sum(axis=0)
    keys, pairs = np.arange(TOKENS) % 2 == 0, np.array([1, 3, 5])
    query, truth, value = np.array([8, 10]), np.array([3, 1]), np.array([0, 2])

    def of(chosen: list[int]) -> tuple[np.ndarray, np.ndarray]:
        asked = Questions(query[chosen], truth[chosen], value[chosen], pairs, keys)
        found = tallied(prompt, read, energy, asked, (1,), np.ones((len(chosen), HEADS)))
        return found.totals[0], found.carried[0]

    (both, carried), each = of([0, 1]), [of([0]), of([1])]
    assert np.allclose(both[:, :7], each[0][0][:, :7] + each[1][0][:, :7])
    assert np.allclose(both[:, 7:], each[0][0][:, 7:])
    assert np.allclose(carried, each[0][1] + each[1][1])
    assert both[1, 7].tolist() == [3, TOKENS]
    assert both[1, 9].tolist() == [6, TOKENS]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts: tuple[int, int]):
    expected = binomtest(*counts).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(*counts) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("counts", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_proportion(counts: tuple[int, int]):
    with pytest.raises(ValueError, match=f"got {counts[0]} of {counts[1]}"):
        wilson(*counts)


def test_causal_share_is_newcombes_example():
    # Newcombe 1998, table II, example (a): 56/70 - 48/80, method 10: .0524 .. .3339
    share, low, high = causal_share((56, 70), (48, 80), 0.0)
    assert (share * 0.8, low * 0.8, high * 0.8) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_causal_share_runs_from_nothing_to_all_that_chance_leaves():
    assert causal_share((90, 100), (90, 100), 0.1)[0] == 0.0
    assert causal_share((90, 100), (10, 100), 0.1)[0] == pytest.approx(1.0)
    assert np.isnan(causal_share((10, 100), (10, 100), 0.1)).all()
