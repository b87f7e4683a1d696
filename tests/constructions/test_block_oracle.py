"""The numpy evaluator that the other tests lean on, against transformers with every weight perturbed."""

import numpy as np
import torch

from mamba_probe.constructions import haar, mqar


def test_evaluator_agrees_with_a_random_mixer(evaluate):
    twin = haar(length=32, levels=2).randomised(seed=5)
    hidden = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        native = twin.model(hidden).numpy()
    assert np.abs(evaluate(twin.model, hidden).out - native).max() < 2e-6 * np.abs(native).max()


def test_evaluator_agrees_with_a_random_language_model(evaluate_lm):
    twin = mqar(n_keys=8, n_values=8).randomised(seed=5)
    input_ids = np.random.default_rng(0).integers(0, 16, (2, 20))
    with torch.no_grad():
        native = twin.model(torch.tensor(input_ids)).logits.numpy()
    assert np.abs(evaluate_lm(twin.model, input_ids) - native).max() < 4e-6 * np.abs(native).max()
