"""fla's cache, as its layers use it: one dictionary of states a layer."""

from typing import Any


class Cache:
    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, layer: int) -> dict[str, Any]:
        return self.states[layer]


def get_layer_cache(module: Any, past_key_values: Cache | None) -> dict[str, Any] | None:
    if past_key_values is not None and len(past_key_values) > module.layer_idx:
        return past_key_values[module.layer_idx]
    return None


def update_layer_cache(module: Any, past_key_values: Cache | None, *, offset: int, **states: Any) -> None:
    if past_key_values is not None and len(past_key_values) <= module.layer_idx:
        past_key_values.states.append(states)
    elif past_key_values is not None:
        past_key_values[module.layer_idx].update({name: state for name, state in states.items() if state is not None})
