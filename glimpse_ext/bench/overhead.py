# SPDX-License-Identifier: BSD-3-Clause
"""Where the time of a call goes that computes next to nothing: layer by layer, for each operator.

Layers, each with what is inside it: an empty tensor of the size of the result; the operator as the
dispatcher has it; the public function without gradients; the same where a gradient is wanted; and
with its backward. Beside them the peers, without gradients and with the backward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .devices import Call, Device
from .report import format_seconds
from .suite import Setting, make_call
from .timing import interleave
from .workloads import WORKLOADS, Workload

LAYERS = ("empty result", "torch.ops", "without gradients", "gradient wanted", "forward+backward")
TINY = tuple(work for work in WORKLOADS if work.overhead)


class _FirstCall(TorchDispatchMode):
    """The first operator of this package that is called, with its arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: tuple[Callable[..., Any], Any, Any] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is None and func.namespace == "glimpse_ext":
            self.found = func, args, kwargs or {}
        return func(*args, **(kwargs or {}))


def _without_gradients(call: Call) -> Call:
    def quiet() -> object:
        with torch.no_grad():
            return call()

    return quiet


def layers(setting: Setting) -> dict[str, Call]:
    """Calls by the name of their layer; those of peers by their name and the direction."""
    work, operator = setting.work, setting.operator
    maps, boxes = setting.features(), setting.boxes()
    pool = operator.ours(work, boxes, setting.dtype)
    recorder = _FirstCall()
    with torch.no_grad(), recorder:
        pooled = pool(maps)
    assert recorder.found is not None
    op, args, kwargs = recorder.found
    calls: dict[str, Call] = {
        "empty result": lambda: torch.empty(pooled.shape, dtype=pooled.dtype, device=pooled.device),
        "torch.ops": _without_gradients(lambda: op(*args, **kwargs)),
        "without gradients": _without_gradients(lambda: pool(maps)),
    }
    differentiable = "forward+backward" in operator.directions(("forward+backward",))
    if differentiable:
        leaves: list[Tensor] = [m.detach().requires_grad_() for m in maps]
        calls["gradient wanted"] = lambda: pool(leaves)
        calls["forward+backward"] = make_call(
            "forward+backward", operator.ours, setting, maps, boxes, torch.ones_like(pooled)
        )
    for peer in operator.peers:
        if peer.compiled or not peer.runs(setting.dtype):
            continue
        for direction in ("forward", "forward+backward") if differentiable else ("forward",):
            calls[f"{peer.name} {direction}"] = make_call(
                direction, peer.make, setting, maps, boxes, torch.ones_like(pooled)
            )
    return calls


def measure(
    device: Device, works: Sequence[Workload] = TINY, rounds: int = 7, round_seconds: float = 0.01
) -> dict[str, dict[str, float]]:
    """Seconds by operator and layer, medians over interleaved rounds on one thread."""
    found = {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for work in works:
            with device.scope():
                calls = layers(Setting(work, device, "float32", "contiguous"))
                for call in calls.values():
                    call()
                watches = {
                    name: device.watch([call], "eager", 1, round_seconds)
                    for name, call in calls.items()
                }
                times = interleave(watches, rounds, 1e9)
            found[work.operator] = {name: statistics.median(t) for name, t in times.items()}
    finally:
        torch.set_num_threads(before)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a line for each operator, with the fastest peer of each kind."""
    lines = [
        f"| operator | {' | '.join(LAYERS)} | fastest peer | its forward+backward |",
        "|---|" + "---|" * (len(LAYERS) + 2),
    ]
    for operator, seconds in found.items():
        cells = [format_seconds(seconds[layer]) if layer in seconds else "–" for layer in LAYERS]
        for direction in (" forward", " forward+backward"):
            peers = {name: t for name, t in seconds.items() if name.endswith(direction)}
            best = min(peers, key=lambda name: peers[name], default=None)
            name = "" if best is None else best.removesuffix(direction)
            cells.append("–" if best is None else f"{format_seconds(peers[best])} ({name})")
        lines.append(f"| {operator} | {' | '.join(cells)} |")
    return "\n".join(lines)
