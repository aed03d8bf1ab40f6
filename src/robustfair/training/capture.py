"""All steps of a training attack as one CUDA graph: one launch where the loop makes a few thousand."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustfair.attacks.pgd import Ascent, Best, Climbed, compares
from robustfair.values import Attack, Model

WARM_UP = 3
"""Runs before a capture: libraries choose their algorithms and compilers compile in them."""
MOST = 8
"""Recordings that are kept: each holds the memory of an attack. A goal that changes with the epochs makes new ones."""


Tensors = tuple[Tensor, ...]
Record = Callable[[Callable[[], Tensors]], tuple[Callable[[], None], Tensors]]
"""Runs a function that launches kernels on given tensors, and returns what launches the same kernels again, and the
tensors that they write the function's results to."""


class _Captured(NamedTuple):
    replay: Callable[[], None]
    inputs: dict[str, Tensor]
    found: Tensors


def cuda_graph(run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
    """A `Record` of all kernels of `run` as one CUDA graph, which need not have run yet when it returns."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph.replay, found


class CapturedAscent:
    """An `Ascent` that records `ascent` the first time an attack of some form and shape comes, and replays it then on.

    Images, labels, start, radii, step sizes, targets and clean logits are copied into tensors that the recorded kernels
    read. The weights are read where they lie, so updates in place are seen; when a tensor of the model moves to other
    memory the attack is recorded anew. What cannot be replayed runs as it is: attacks that compare points, stop
    examples or add noise, or whose goal or watch holds more than numbers and texts. Attacks in mode "train" write
    running statistics and must not come here.

    Args:
        ascent: how the steps are run.
        model: whose weights the attack reads.
        record: how kernels are recorded.
    """

    def __init__(self, ascent: Ascent, model: nn.Module, record: Record = cuda_graph) -> None:
        self.ascent = ascent
        self.model = model
        self.record = record
        self._captured: dict[Hashable, _Captured] = {}
        self._places: tuple[int, ...] = ()

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        clean: Tensor | None,
        x_adv: Tensor,
        attack: Attack,
        best: Best,
        rng: torch.Generator,
    ) -> Climbed:
        if not replayable(attack):
            return self.ascent(model, x, y, clean, x_adv, attack, best, rng)
        places = tuple(t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers()))
        if places != self._places:
            self._captured.clear()
            self._places = places
        given = {"x": x, "y": y, "x_adv": x_adv, "eps": attack.eps, "step_size": attack.step_size}
        if clean is not None:
            given["clean"] = clean
        if attack.target is not None:
            given["target"] = attack.target
        shapes = tuple((name, t.shape, t.stride(), t.dtype) for name, t in given.items())
        modes = tuple(module.training for module in self.model.modules())
        read, kept_in = (attack.goal, attack.watch), (attack.box_first, attack.box, attack.ball)
        key = (shapes, modes, attack.steps, *read, attack.norm, attack.mode, *kept_in)
        if key not in self._captured:
            while len(self._captured) >= MOST:
                del self._captured[next(iter(self._captured))]
            self._captured[key] = self._capture(model, given, attack, best, rng)
        captured = self._captured[key]
        for name, tensor in given.items():
            captured.inputs[name].copy_(tensor)
        captured.replay()
        x_adv, *watched = (tensor.clone() for tensor in captured.found)
        return Climbed(x_adv, best, *watched)

    def _capture(
        self, model: Model, given: dict[str, Tensor], attack: Attack, best: Best, rng: torch.Generator
    ) -> _Captured:
        inputs = {name: tensor.detach().clone() for name, tensor in given.items()}
        attack = replace(attack, eps=inputs["eps"], step_size=inputs["step_size"], target=inputs.get("target"))

        def run() -> Tensors:
            places = inputs["x"], inputs["y"], inputs.get("clean"), inputs["x_adv"]
            climbed = self.ascent(model, *places, attack, best, rng)
            return (climbed.x_adv,) if climbed.watched is None else (climbed.x_adv, climbed.watched)

        replay, found = self.record(run)
        return _Captured(replay, inputs, found)


def replayable(attack: Attack) -> bool:
    """Whether an attack is a fixed sequence of kernels on given tensors that writes nothing but its result."""
    fixed = attack.steps > 0 and attack.stop is None and not attack.noise and not compares(attack)
    return fixed and is_dataclass(attack.goal) and _is_plain(attack.goal) and _is_plain(attack.watch)


def _is_plain(value: Any) -> bool:
    """Whether a value can name a recording: numbers and texts, alone, in tuples or in frozen dataclasses."""
    if value is None or isinstance(value, int | float | str):
        return True
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if not is_dataclass(value) or isinstance(value, type) or not value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return False
    return all(_is_plain(getattr(value, field.name)) for field in fields(value))
