"""What a probe, a recorder and a construction say of themselves, as text and in a notebook."""

from typing import Any

from mamba_probe.trace.html import card

__all__ = ["construction_html", "probe_html", "probe_text", "recorder_html", "recorder_text"]


def probe_text(self: Any) -> str:
    """Where it is attached, its layers and their sizes, and the edits that act now."""
    lines = [_attached(self), *(f"  {span}: {sizes}" for span, sizes in _groups(self)), *_edits(self, "  ")]
    return "\n".join(lines)


def probe_html(probe: Any) -> str:
    """The same in a notebook."""
    return card(_attached(probe), ("layers", "family and sizes"), _groups(probe), _edits(probe))


def recorder_text(self: Any) -> str:
    """What it records, and how far it is."""
    plan = self._plan
    return f"Recorder({', '.join(plan.variables)} of {len(plan.layers)} layer(s); {_state(self)})"


def recorder_html(recorder: Any) -> str:
    """The same in a notebook."""
    plan = recorder._plan
    rows = [
        ("variables", ", ".join(plan.variables)), ("layers", ", ".join(map(str, plan.layers))),
        ("family and sizes", plan.sizes),
    ]  # fmt: skip
    return card(f"Recorder {_state(recorder)}", ("what", "recorded"), rows)


def construction_html(construction: Any) -> str:
    """What `describe` says, in a notebook."""
    head, *said = construction.describe().split("\n")
    rows = [(name, size) for name, size in construction.sizes.items()]
    return card(head, ("dimension", "size"), rows, said)


def _attached(probe: Any) -> str:
    state = "attached to" if probe.attached else "detached from"
    return f"Probe {state} {type(probe.model).__name__}, backend {probe.backend} ({probe.backend_reason})"


def _groups(probe: Any) -> list[tuple[str, str]]:
    """Layers that are alike, and what they are."""
    found = []
    for sizes, layers in probe.groups.items():
        whole = layers[-1] - layers[0] == len(layers) - 1
        numbers = f"{layers[0]}..{layers[-1]}" if whole else ", ".join(map(str, layers))
        found.append((f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers {numbers}", sizes))
    return found


def _edits(probe: Any, indent: str = "") -> list[str]:
    edits = {repr(edit): None for tap in probe._taps.values() for edit in tap.edits}
    return [f"{indent}edits: {', '.join(edits)}"] if edits else []


def _state(recorder: Any) -> str:
    calls = recorder.n_calls
    return "whole" if recorder._closed and calls else f"open, {calls} call(s) so far"
