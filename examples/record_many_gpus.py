"""How do many GPUs, or many CPU processes, record one run together? Writes a store, and draws nothing.

    torchrun --nproc-per-node 8 --max-restarts 3 examples/record_many_gpus.py -o run.zarr
    torchrun --nproc-per-node 8 examples/record_many_gpus.py state-spaces/mamba-130m --text notes/ -o run.zarr

Each process records its share of the blocks of rows. After a fault torchrun starts them again, or the same command
does, with as many processes as before or not: they go on with the blocks that are missing.
"""

import argparse
import os

import torch

import mamba_probe as mp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="zoo:trained-mqar-mamba1")
parser.add_argument("--text", help="a file, a folder of them or a glob; without it rows of mqar")
parser.add_argument("--rows", type=int, default=64, help="rows of mqar")
parser.add_argument("--length", type=int, default=64, help="tokens of a row")
parser.add_argument("--batch-size", type=int, default=4, help="rows of a block: of one forward call")
parser.add_argument("-o", "--out", default="run.zarr")
asked = parser.parse_args()

rank, processes = mp.shard() or (0, 1)  # without torchrun: one process
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
model = mp.load(asked.model).to(device)
if asked.text:  # every process reads all of it, and lays out the same rows
    inputs = mp.corpus(asked.text, tokenizer=mp.load_tokenizer(asked.model), layout="packed", length=asked.length)
else:
    inputs = mp.tasks.mqar(batch=asked.rows, length=asked.length, vocab=256, seed=0)

with mp.attach(model) as probe:
    if rank == 0:
        print(f"{processes} process(es): {probe.estimate(inputs)}")
    trace = probe.record(
        inputs, store=asked.out, batch_size=asked.batch_size, resume=True, shard=mp.shard(), progress=rank == 0
    )
if rank == 0:
    print(f"{asked.out} holds {trace.sizes['batch']} rows; those of other processes may still be on their way")
