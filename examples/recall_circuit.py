"""Which parts of the closed-form MQAR model store, match and read? Draws recall_circuit.png."""

import matplotlib.pyplot as plt

import mamba_probe as mp
from mamba_probe.analyses import recall_circuit
from mamba_probe.run import record_task

model = mp.load("zoo:mqar-mamba1")
run = record_task(model, "mqar", rows=16, length=64, n_pairs=8)  # trace, weights, edits and a randomised twin
circuit = recall_circuit.measure(run.trace, weights=run.weights, interventions=run.interventions, baseline=run.twin)
print(circuit.attrs["verdict"])
figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
recall_circuit.plot(circuit, ax)
figure.savefig("recall_circuit.png", dpi=160)
