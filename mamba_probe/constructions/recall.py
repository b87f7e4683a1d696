"""One-layer language models that solve multi-query associative recall."""

import math
from difflib import get_close_matches
from functools import partial

import numpy as np
import torch

from mamba_probe.constructions.construction import Construction
from mamba_probe.constructions.recall_and import s4d_table
from mamba_probe.constructions.recall_codes import Codes, codes_of
from mamba_probe.constructions.recall_language import EPSILON, as_ids, language_model
from mamba_probe.constructions.recall_random import random_tables
from mamba_probe.constructions.recall_signatures import recall_signatures, recall_states
from mamba_probe.constructions.recall_tables import LOG_DECAY, mamba1_table, mamba2_table, overwrite_table
from mamba_probe.constructions.tables import Table, check_dtype

__all__ = ["mqar"]

KEPT = 0.4  # share of the memory that a write leaves with writes="last"; below 1/2, so that the newest wins
CHOICES = {
    "mixer": ("mamba1", "mamba2", "s4d"),
    "key_code": ("one-hot", "constant-weight", "random"),
    "writes": ("add", "last", "overwrite"),
}

ONE_HOT = """The convolution brings the previous token's key to B and the current token's key to C; a value token
has delta = 1, any other softplus(log(e - 1) - 40), and nothing decays: the states of a key hold the code of the value
that followed it. A key token opens the gate and reads them; lm_head compares the code with every value's, so that the
right logit exceeds the others by at least 1."""
SHARED = """The convolution brings the previous token's key to B and the current token's key to C; a value token
has delta = 1, any other softplus(log(e - 1) - 40), and nothing decays. Two keys share at most w - 1 of the w ones in
their codes: a query reads its own value with weight 1, another's with at most 1 - 1/w, as long as no value is there
twice. Norms rescale the logits and leave their order."""
LAST = """The convolution brings the previous token's key to B and the current token's key to C; a value token has
delta = 1 and multiplies the whole memory by 0.4, any other token softplus(log(e - 1) - 40). The newest value of a key
outweighs all its older ones together, 0.4 + 0.4^2 + ... = 2/3 of it."""
RANDOM = """As with one-hot keys, but the codes are random: silu(1) and silu(-1) differ by 1, and the projections after
it subtract their mean, so that B, C and what is written are +1 and -1. In Mamba-2 nothing follows B and C: the keys
there have as many +1 as -1, and one more state takes the rest off. Other keys add noise to what a query reads."""
AND = """Nothing is selected: A, B, C and delta are constant. Each channel is one key bit and one value bit: the
convolution, +1 on the token before and -1 on the current one, and a threshold let it write where the value bit comes
right after the key bit. It sums its writes, and a key token opens the gate of its own bits' channels: the outer product
that Mamba holds in states, in channels."""
OVERWRITE = """Each key has its own channels, with A = -1: a value that follows the key has delta = 40 there, which
erases what was held and writes the new value's code; any other token has softplus(-40) and leaves it. A key token opens
the gate of its channels alone."""
CLAIMS = {"one-hot": ONE_HOT, "constant-weight": SHARED, "random": RANDOM, "last": LAST, "overwrite": OVERWRITE}


def mqar(
    mixer: str = "mamba1",
    n_keys: int = 64,
    n_values: int = 64,
    key_code: str = "one-hot",
    writes: str = "add",
    bits: tuple[int, int] | None = None,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Construction:
    r"""Build the language model that answers every query of `mamba_probe.tasks.mqar`.

    With key codes phi of weight w_k and value codes chi,

    .. math:: \mathrm{logit}_t(v) = \frac1{w_k} \Bigl\langle \chi(v), \sum_{s \le t} \Delta_s\,
        \langle \phi(x_t), \phi(x_{s-1})\rangle \,\chi(x_s) \Bigr\rangle, \qquad
        \Delta_s = 1 \text{ at values},\ < 10^{-17} \text{ elsewhere}

    at a query t, up to the last norm; S4D has no Delta, and writes where a value follows a key. One-hot keys, with
    value codes of constant weight w: w at the answer and at most w - 1 elsewhere. Constant-weight keys, with one-hot
    values: 1 and at most 1 - 1/w_k, for values that differ within a row. Mamba-2's gated norm divides what a query
    reads by its root mean square: with one-hot keys and "add" that is known and undone, elsewhere the logits keep their
    order and not their size. Source: ours (our construction of the claim of arXiv 2506.11891 on associative recall).

    Arguments:
        mixer: "mamba1"; "mamba2" with one group, one head and the gated norm; or "s4d", whose channels are as many as
            the key's bits times the value's: 2,816 for 256 keys and values, the most that is tested here, and 61,440
            for 4,096, which nothing here has run.
        n_keys: token ids `0 .. n_keys - 1`; token 0 is the filler, which leaves `n_keys - 1` keys.
        n_values: token ids `n_keys .. n_keys + n_values - 1`; the task's halves are equal, `n_keys == n_values`.
        key_code: "one-hot": a state a key. "constant-weight": as many states as give each key its own choice of half
            of them; values must not repeat within a row. "random": keys and values have random codes of +1 and
            -1, half and half for Mamba-2's keys, and the answer is right up to chance overlaps, which need
            n_key_bits n_value_bits >> 4 (pairs - 1) log(n_values pairs); S4D has
            4 n_key_bits n_value_bits + 2 n_value_bits channels.
        writes: "add": each key is followed by a value once in a row. With one-hot keys in Mamba, for keys that come
            again: "last": each write multiplies all older ones by 0.4; float32 loses a value after about 100 later
            writes. "overwrite", in Mamba-1: a write erases the value of its own key alone, at n_values' bits a key in
            channels.
        bits: for "random" keys alone: numbers of bits (key, value).
        seed: for "random" keys alone: of the codes.
        dtype: of the weights, float32 or float64.

    Returns:
        A construction around a `MambaForCausalLM` or `Mamba2ForCausalLM`, or for S4D our own language model. A code of
        d bits for m tokens has the least d for which C(d, d // 2) >= m. `inputs` makes a tensor of token ids; the
        answers are the task's `target`. With writes="add" and no random codes, in Mamba, `bound` is that of each code's
        bit that a query reads, norms aside.

    Raises:
        ValueError: if there is no key or fewer than two values, or fewer codes of `bits` than tokens, or the mixer,
            key code, writes or dtype is another one, or they do not go together.

    Example:
        >>> import torch
        >>> from mamba_probe.tasks import mqar as task_of
        >>> construction = mqar(n_keys=8, n_values=8)
        >>> construction
        Construction(mqar: MambaForCausalLM, model=13, channel=26, state=8, rank=1, float32)
        >>> task = task_of(batch=4, length=16, n_pairs=3, vocab=16)
        >>> with torch.no_grad():
        ...     logits = construction.model(construction.inputs(task.input_ids)).logits
        >>> task.accuracy(logits.argmax(-1))
        (12, 12)
        >>> mqar("mamba2", n_keys=8, n_values=8, key_code="constant-weight")
        Construction(mqar: Mamba2ForCausalLM, model=13, channel=13, state=5, head=1, float32)
        >>> mqar("s4d", n_keys=8, n_values=8)
        Construction(mqar: LanguageModel, model=13, channel=40, state=1, float32)
    """
    _check(mixer, n_keys, n_values, key_code, writes)
    _check_random(mixer, n_keys, n_values, key_code, bits, seed)
    check_dtype(dtype)
    if bits is not None and seed is not None:
        block, embedding, head, channels = random_tables(mixer, n_keys, n_values, *bits, seed)
        exact = False
    else:
        codes = codes_of(key_code, n_keys, n_values)
        (block, channels), embedding, head = _table(codes, mixer, writes), codes.embedding, _head(codes)
        exact = writes == "add" and mixer != "s4d"  # in S4D every token adds to the error, in Mamba every pair
    return Construction(
        name="mqar",
        model=language_model([block], embedding, head, dtype),
        inputs=partial(as_ids, name="mqar", vocab=n_keys + n_values),
        expected=None,
        read_out=None,
        bound=(n_keys - 1) * math.exp(LOG_DECAY) if exact else None,
        channels=channels,
        claim=AND if mixer == "s4d" else CLAIMS[key_code if writes == "add" else writes],
        states=recall_states(mixer, key_code, writes, block.own["d_state"]),
        signatures=recall_signatures(mixer, key_code, writes),
    )


def _table(codes: Codes, mixer: str, writes: str) -> tuple[Table, list[str]]:
    if mixer == "s4d":
        return s4d_table(codes)
    if writes == "overwrite":
        return overwrite_table(codes)
    log_decay = math.log(-math.log(KEPT)) if writes == "last" else LOG_DECAY
    return mamba1_table(codes, log_decay) if mixer == "mamba1" else mamba2_table(codes, log_decay)


def _head(codes: Codes) -> np.ndarray:
    """Return lm_head (token, model): the values' codes, scaled to undo the last norm at a query.

    The residual adds the query's own key to the answer there.
    """
    head, n_keys = np.zeros_like(codes.embedding), len(codes.key)
    square = codes.key_weight + codes.value_weight
    head[n_keys:] = codes.embedding[n_keys:] * math.sqrt(square / codes.model + EPSILON)
    return head


def _check_random(
    mixer: str, n_keys: int, n_values: int, key_code: str, bits: tuple[int, int] | None, seed: int | None
) -> None:
    given = f"(got bits={bits}, seed={seed})"
    if key_code != "random":
        if bits is not None or seed is not None:
            raise ValueError(f'mqar: bits and seed go with key_code="random" alone {given}')
        return
    if bits is None or seed is None:
        raise ValueError(f'mqar: key_code="random" needs bits=(key bits, value bits) and a seed {given}')
    (key, value), keys = bits, n_keys - 1
    if min(bits) < 1:
        raise ValueError(f"mqar: needs at least one bit a key and a value (got bits={bits})")
    if mixer == "mamba2" and key % 2:
        raise ValueError(f'mqar: mixer="mamba2" needs an even number of key bits, half of them +1 (got {key})')
    codes, formula = (math.comb(key, key // 2), f"C({key}, {key // 2})") if mixer == "mamba2" else (2**key, f"2**{key}")
    needs = {
        f"{formula} >= n_keys - 1, a code a key (got {codes} < {keys})": codes >= keys,
        f"2**{value} >= n_values, a code a value (got {2**value} < {n_values})": 2**value >= n_values,
    }
    _require(needs)


def _check(mixer: str, n_keys: int, n_values: int, key_code: str, writes: str) -> None:
    for name, given in {"mixer": mixer, "key_code": key_code, "writes": writes}.items():
        if given not in CHOICES[name]:
            near = get_close_matches(str(given), CHOICES[name], n=1, cutoff=0.75)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(f'"{choice}"' for choice in CHOICES[name])
            raise ValueError(f"mqar: {name}={given!r} is not supported{hint}; use one of {known}")
    if writes != "add" and mixer == "s4d":
        raise ValueError(
            f'mqar: writes={writes!r} needs mixer="mamba1"' + (' or "mamba2"' if writes == "last" else "") + ": "
            "S4D is time-invariant, so that no write can shrink or erase an older one"
        )
    if writes != "add" and key_code != "one-hot":
        raise ValueError(f'mqar: writes={writes!r} needs key_code="one-hot": other keys would drown the answer')
    if writes == "overwrite" and mixer != "mamba1":
        raise ValueError('mqar: writes="overwrite" needs mixer="mamba1": dt of Mamba-2 does not see the previous token')
    needs = {
        f"n_keys >= 2, the filler and a key (got {n_keys})": n_keys >= 2,
        f"n_values >= 2 (got {n_values})": n_values >= 2,
    }
    _require(needs)


def _require(needs: dict[str, bool]) -> None:
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"mqar: needs {'; '.join(failed)}")
