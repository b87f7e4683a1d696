r"""
What no time-invariant layer can do
===================================

How many states would a time-invariant layer need for a kernel with a jump, such as a Haar wavelet?

Against the number of states stands the error of the best fit found by each family of exponents. No time-invariant
kernel enters the grey region: that is a theorem. The best Haar terms (blue circles) have no such bound, and a
selective layer can use them: two terms are exact here.
"""

import numpy as np

from mamba_probe.analyses import lti_limits

step = np.repeat([1.0, 0.0], 128)[None]  # a window over the last 128 of 256 tokens
result = lti_limits.measure(step)
for n, bound in zip(result["n_states"].values, result["lower_bound"].values[0], strict=True):
    best = result["error"].sel(fit="optimised", n_states=n).item()
    print(f"{n} states: error at least {bound:.3f}, {best:.3f} found")
ax = lti_limits.plot(result)
ax.figure.savefig("lti_limits.png", dpi=140)
