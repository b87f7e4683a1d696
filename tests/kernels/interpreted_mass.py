"""mass and mass_distance by the Triton kernel through its interpreter, in several chunks: one line a case."""

import torch
from oracle import cast, closed_form, draw, errors, featured, violations

from mamba_probe.kernels.scan import Emit, mass, selective_scan

torch.use_deterministic_algorithms(True)  # torch.empty answers NaN: an output that is not written shows
NAMES = "mass", "mass_distance"
PER_TOKEN = "x", "delta", "B", "C", "z"


def run(arguments, tile, names=NAMES, backend="triton", **options):
    mass.choose_tile = lambda a: mass.Tile(*tile)
    emission = selective_scan(**arguments, emit=Emit(names, **options), backend=backend).emission
    return {name: getattr(emission, name) for name in names}


def bound(arguments, tile):
    naive, found = (run(arguments, tile, backend=name) for name in ("naive", "triton"))
    broken = violations(found, closed_form(**cast(arguments, torch.float32)), naive)
    assert not broken, broken


CASES = (  # features, groups, (head, head_channel, state, whether A is a scalar), tile
    (("zoh",), 2, (6, 1, 5, False), (4, 8, 3)),
    (("seq_idx", "constant"), 1, (6, 1, 1, False), (32, 4, 2)),
    (("log_decay", "seq_idx"), 1, (3, 2, 33, False), (4, 16, 2)),
    (("seq_idx", "zoh"), 1, (3, 3, 16, True), (2, 8, 3)),
    (("log_decay",), 2, (4, 1, 5, True), (2, 4, 3)),
    (("constant",), 1, (2, 2, 130, True), (1, 4, 2)),
)
for features, group, shape, tile in CASES:
    arguments = featured(draw(None, 1, 21, group, shape=shape), features)
    arguments["delta"] = arguments["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    bound(arguments, tile)
    print("held", features)
arguments = draw("mamba", 1, 23)
exact, tile = closed_form(**arguments), (2, 4, 3)
part = run(arguments, tile, tokens=(0, 8, 20), channels=(4, 1))
assert max(errors(part, {name: exact[name][:, [0, 8, 20]][:, :, [4, 1]] for name in NAMES}).values()) < 1e-6
for name in NAMES:  # alone
    assert max(errors(run(arguments, tile, (name,)), exact).values()) < 1e-6, name
print("held selection")
assert max(errors(run(cast(arguments, torch.float64), tile), exact).values()) < 1e-12
print("held double")
bound(cast(arguments, torch.bfloat16, PER_TOKEN), tile)
print("held bfloat16")
bound(arguments | {"A": torch.full((6, 5), -1e-6)}, tile)
arguments["delta"][:, 10] = 1e4
bound(arguments | {"delta_limits": (0.0, float("inf"))}, tile)
print("held extremes")
every = {"delta_softplus": False, "delta_limits": (-float("inf"), float("inf")), "A": arguments["A"] / 300}
arguments["delta"][:, 10] = 1.0
bound(arguments | every, tile)
print("held negative steps")
arguments["delta"][0, 20, 3] = float("nan")
bad = torch.zeros(1, 23, 6, dtype=torch.bool)
bad[:, 20:, 3] = True
assert all(torch.equal(value.isnan(), bad) for value in run(arguments, tile).values())
print("held nan")
