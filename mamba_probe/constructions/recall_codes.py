"""The codes by which a recall model tells its keys and its values apart."""

import math
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
from jaxtyping import Float

__all__ = ["Codes", "codes_of", "constant_weight"]


@dataclass(frozen=True, eq=False)
class Codes:
    """0/1 codes, each key's of one weight and each value's of one weight; key 0, the filler, is all zero."""

    key: Float[np.ndarray, "key bit"]
    value: Float[np.ndarray, "value bit"]

    @property
    def key_weight(self) -> float:
        """Number of ones in each key's code."""
        return float(self.key[1].sum())

    @property
    def value_weight(self) -> float:
        """Number of ones in each value's code."""
        return float(self.value[0].sum())

    @property
    def model(self) -> int:
        """Model size: one feature a bit."""
        return self.key.shape[1] + self.value.shape[1]

    @property
    def embedding(self) -> Float[np.ndarray, "token model"]:
        """The tokens' embeddings: (key code, 0) or (0, value code)."""
        embedding = np.zeros((len(self.key) + len(self.value), self.model))
        embedding[: len(self.key), : self.key.shape[1]] = self.key
        embedding[len(self.key) :, self.key.shape[1] :] = self.value
        return embedding


def codes_of(key_code: str, n_keys: int, n_values: int) -> Codes:
    """Return one-hot keys with constant-weight values, or, for "constant-weight", the other way round."""
    if key_code == "one-hot":
        key, value = np.eye(n_keys), constant_weight(n_values)
        key[0] = 0
        return Codes(key, value)
    code = constant_weight(n_keys - 1)
    return Codes(np.concatenate([np.zeros_like(code[:1]), code]), np.eye(n_values))


def constant_weight(count: int) -> Float[np.ndarray, "code bit"]:
    """Return the first `count` 0/1 codes of the least even weight split: C(d, d // 2) >= count."""
    bits = next(d for d in range(2, 64) if math.comb(d, d // 2) >= count)
    code = np.zeros((count, bits))
    for row, ones in zip(code, islice(combinations(range(bits), bits // 2), count), strict=True):
        row[list(ones)] = 1
    return code
