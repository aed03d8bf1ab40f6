"""All steps of a training attack as one CUDA graph: one launch where the loop makes a few thousand."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields, is_dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustfair.attacks.pgd import Ascent, Best, compares
from robustfair.values import Attack, Goal, Model

WARM_UP = 3
"""Runs before a capture: libraries choose their algorithms and compilers compile in them."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    x_adv: Tensor


class CapturedAscent:
    """An `Ascent` that records `ascent` the first time an attack of some form and shape comes, and replays it then on.

    The weights are read where they lie, so updates in place are seen; when a tensor of the model moves to other memory
    the attack is recorded anew. What cannot be replayed runs as it is: attacks that compare points, stop examples or
    add noise, or whose goal holds tensors of its own. Attacks in mode "train" write running statistics and must not
    come here.
    """

    def __init__(self, ascent: Ascent, model: nn.Module) -> None:
        self.ascent = ascent
        self.model = model
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
    ) -> tuple[Tensor, Best]:
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
        key = (shapes, attack.steps, attack.goal, attack.norm, attack.mode, attack.box_first, attack.box)
        if key not in self._captured:
            self._captured[key] = self._capture(model, given, attack, best, rng)
        captured = self._captured[key]
        for name, tensor in given.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        return captured.x_adv.clone(), best

    def _capture(
        self, model: Model, given: dict[str, Tensor], attack: Attack, best: Best, rng: torch.Generator
    ) -> _Captured:
        inputs = {name: tensor.detach().clone() for name, tensor in given.items()}
        attack = replace(attack, eps=inputs["eps"], step_size=inputs["step_size"], target=inputs.get("target"))

        def run() -> Tensor:
            places = inputs["x"], inputs["y"], inputs.get("clean"), inputs["x_adv"]
            return self.ascent(model, *places, attack, best, rng)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x_adv = run()
        return _Captured(graph, inputs, x_adv)


def replayable(attack: Attack) -> bool:
    """Whether an attack is a fixed sequence of kernels on given tensors that writes nothing but its result."""
    return _is_plain(attack.goal) and attack.stop is None and not attack.noise and not compares(attack)


def _is_plain(goal: Goal) -> bool:
    """Whether a goal is a value that can name a graph: a dataclass that is hashable and holds no tensor."""
    if not is_dataclass(goal) or any(isinstance(getattr(goal, field.name), Tensor) for field in fields(goal)):
        return False
    try:
        hash(goal)
    except TypeError:
        return False
    return True
