"""
Where the answer passes
=======================

Through which quantity of the recurrence, and at which token, does another value reach a recall model's answer?

Two prompts differ in one value. Each cell patches one quantity at one token of the second run into the first: 1
(red) is the whole change of the answer, 0 (white) none. The value enters at its own token through x; the state h
carries it from there to the query, where y reads it.
"""

import torch

import mamba_probe as mp

model = mp.load("zoo:trained-mqar-mamba1")  # one layer, trained to recall 8 pairs
task = mp.tasks.mqar(batch=1, length=32, n_pairs=4, vocab=256, power_a=0.01, filler="zero", seed=4)
base = torch.as_tensor(task.input_ids)
query = int((task.target[0] >= 0).nonzero()[0][0])  # the first one; its value stood at `stored`
stored, old = int(task.source_token[0, query]), int(task.target[0, query])
source = base.clone()
source[0, stored] = new = 255 if old != 255 else 254  # the same prompt, but for that value


def answer(logits):
    """The new value's logit over the old one's, at the query."""
    return logits[:, query, new] - logits[:, query, old]


with mp.attach(model) as probe:
    quantities = (*mp.patching.DEFAULT, "z", "y", "h", "resid_pre")
    exact = mp.patching.sweep(probe, base, source, answer, quantities=quantities, tokens=range(query + 2))
    quick = mp.patching.attribute(probe, base, source, answer, tokens=range(query + 2), exact=exact)
print(f"answer {exact.base.item():.1f} in base, {exact.source.item():.1f} in source")
print(exact.recovered.isel(layer=0, batch=0).to_pandas().round(2).loc[:, [stored - 1, stored, stored + 1, query]])
print(quick[["error_rms", "pearson", "sign_agreement"]].to_dataframe().round(3))
roles = {stored - 1: "key", stored: "value", query: "query"}
texts = [f"{roles.get(token, '')} {int(base[0, token])}".strip() for token in range(query + 2)]
ax = mp.patching.plot(exact, token_text=texts)
ax.figure.savefig("patching.png", dpi=140)
