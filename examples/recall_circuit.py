"""
The circuit of associative recall
=================================

Which parts of the closed-form model of recall store a pair, match it with a query and read it?

Each line of the first picture is a signature: the dot is measured, the grey bar is chance, the diamond the
construction; below the line, what an edit of the model takes of the accuracy. The diagram says the same by parts: a
coloured box is nearer to the construction than to chance, and names the channels and states that carry it.
"""

import matplotlib.pyplot as plt

import mamba_probe as mp
from mamba_probe.analyses import recall_circuit
from mamba_probe.run import record_task

model = mp.load("zoo:mqar-mamba1")
run = record_task(model, "mqar", rows=16, length=64, n_pairs=8)  # trace, weights, edits and a randomised twin
circuit = recall_circuit.measure(run.trace, weights=run.weights, interventions=run.interventions, baseline=run.twin)
print(circuit.attrs["verdict"])
table = recall_circuit.distance(circuit).isel(layer=0).reset_coords(drop=True)
print(table[["measured", "ideal", "null", "distance"]].to_dataframe().round(3))
for kind, size in {"signatures": (8, 5.6), "diagram": (7, 4)}.items():
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    recall_circuit.plot(circuit, ax, kind=kind)
    figure.savefig("recall_circuit.png" if kind == "signatures" else "recall_circuit_diagram.png", dpi=160)
