"""
Where a key meets its value
===========================

Which token holds a key's pair, and did the convolution bring the key there?

The keys of a prompt are exchanged, and the clean run's value is put back at one place and one token at a time: a
cell is the share of the answer that comes back. Before the convolution it is spread over key and value; after it,
one token has it all. On the right the same with intervals, beside another row's value and an untrained twin.
"""

import matplotlib.pyplot as plt

import mamba_probe as mp
from mamba_probe.analyses import association
from mamba_probe.associating import associating

task = mp.tasks.mqar(batch=24, length=64, n_pairs=8, vocab=256, filler="zero", seed=5)
results = {}
for name in ("mqar-mamba1", "trained-mqar-mamba1", "trained-mqar-no-conv"):
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        found = associating(probe, task, twin_seed=0)
    results[name] = association.measure(found)
    print(f"{name}: {results[name].attrs['verdict']}")
    for kind in ("recovered", "null_recovered", "twin_recovered"):
        print(kind, results[name][kind].sel(site="scan").isel(layer=0).values.round(2) + 0.0)
figure, panels = plt.subplots(2, 2, figsize=(13, 6.4), layout="constrained", width_ratios=(1.1, 1))
for row, name in zip(panels, ("mqar-mamba1", "trained-mqar-mamba1"), strict=True):
    association.plot(results[name], row[0])
    association.plot(results[name], row[1], kind="bars")
figure.savefig("association.png", dpi=110)
