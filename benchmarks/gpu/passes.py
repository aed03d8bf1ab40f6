"""Checks of what a network computes, of attacks on it, and of attacks that are recorded and replayed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.check import (
    FACTOR,
    HALF,
    OUTSIDE,
    UNIT,
    Check,
    Setting,
    apart,
    data_of,
    largest,
    middle,
    moved,
    nudge,
    shaken,
    starts_from_cpu,
)
from benchmarks.measure import products_in
from benchmarks.tape import taped
from benchmarks.workload import build
from robustfair.attacks.pgd import Ascent, FreezeFooled, pgd
from robustfair.config import Precision
from robustfair.data import evaluation_batches
from robustfair.execution.precision import InPrecision, full_float32, numerics
from robustfair.losses import MaximiseCE, MinimiseCE
from robustfair.training.capture import CapturedAscent, cuda_graph
from robustfair.training.engine import Engine
from robustfair.values import Attack, Batch, Model, seeded_generator

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def passes(setting: Setting) -> list[Check]:
    """Logits, and gradients of images and of weights, in each precision."""
    size = 4 if setting.small else 32
    batch = next(evaluation_batches(data_of(size), size))
    model, checks = smooth_network(), []
    wanted = gradients(deepcopy(model).double(), replace(batch, x=batch.x.double()))
    for name in ("fp32", "tf32", "bf16"):
        precision: Precision = "bf16" if name == "bf16" else "fp32"
        emulated = rounded_products(deepcopy(model)) if name == "tf32" else deepcopy(model)
        rounding = gradients(InPrecision(emulated, precision, "cpu", bundled=False), batch)
        with float32_as("tf32" if name == "tf32" else "ieee"):
            there = deepcopy(model).to(setting.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            called = InPrecision(there, precision, torch.device(setting.device).type)
            found = gradients(called, moved(batch, setting.device))
        for what, value in found.items():
            tolerance = FACTOR * apart(rounding[what], wanted[what])
            checks.append(Check(f"{what}, {name}", "CPU float64", apart(value, wanted[what]), tolerance))
    return checks


def smooth_network() -> nn.Module:
    """Convolutions, batch norm and a smooth nonlinearity: its gradients round as its logits do."""

    def block(ins: int, outs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs), nn.Softplus()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [*block(3, 16, 1), *block(16, 32, 2), *block(32, 64, 2)]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Logits in eval mode and the gradient of the images there, and of all weights in train mode."""
    x = batch.x.detach().clone().requires_grad_(True)
    logits = model.eval()(x)
    images = torch.autograd.grad(MaximiseCE()(logits, None, batch.y).sum(), x)[0]
    loss = MaximiseCE()(model.train()(batch.x), None, batch.y).mean()
    weights = torch.autograd.grad(loss, list(model.parameters()))
    return {
        "logits": logits.detach(),
        "gradient of images": images,
        "gradient of weights": torch.cat([part.flatten() for part in weights]),
    }


def rounded_products(model: nn.Module) -> nn.Module:
    """The model with inputs and weights of its convolutions and linear maps rounded to the ten bits of tf32."""

    def ten_bits(values: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(values.detach())
        return values + (torch.ldexp((mantissa * 2**11).round() / 2**11, exponent) - values).detach()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda layer, inputs: (ten_bits(inputs[0]),))
            module.weight.data = ten_bits(module.weight.data)
    return model


@contextmanager
def float32_as(precision: str) -> Iterator[None]:
    """float32 convolutions and products of a GPU in "ieee" or "tf32"."""
    with full_float32(), products_in(precision):
        torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
        yield


ATTACKS: dict[str, dict[str, Any]] = {
    "linf": {},
    "linf, no box": {"box": False},
    "linf, no ball": {"ball": False, "start_radius": 2.0},
    "l2": {"norm": "l2"},
    "l2, box first": {"norm": "l2", "box_first": True},
    "best point": {"keep": "best"},
    "stop rule": {"stop": FreezeFooled()},
    "stop rule, inside": {"stop": FreezeFooled(), "keep": "inside"},
    "batch statistics": {"mode": "train_frozen"},
}


def attack_on(batch: Batch, case: str) -> Attack:
    """An attack of `ATTACKS`, or to a target, whose radii and steps differ from image to image and batch to batch."""
    given = {"goal": MinimiseCE(), "target": (batch.y + 1 + batch.seed) % 10} if case == "target" else ATTACKS[case]
    radius, share = torch.rand(2, len(batch.y), generator=seeded_generator("cpu", "radii", batch.seed))
    scale = 20 if given.get("norm") == "l2" else 1
    eps = (scale * (0.01 + 0.05 * radius)).to(batch.x)
    return Attack(**{"eps": eps, "step_size": eps * share.to(eps), "steps": 4, "goal": MaximiseCE()} | given)


def attacks(setting: Setting) -> list[Check]:
    """PGD in float64, where no gradient is near enough to zero to change its sign, and in float32 within its reach."""
    size, checks = 8 if setting.small else 64, []
    model = build("preact-resnet18", 2).double()
    batch = next(evaluation_batches(data_of(size), size))
    double = replace(batch, x=batch.x.double())
    for case in (*ATTACKS, "target"):
        attack = attack_on(double, case)
        with starts_from_cpu():
            wanted, nudged = (pgd(m, double.x, double.y, attack, double.rng("a")) for m in (model, shaken(model)))
            there, on = deepcopy(model).to(setting.device), moved(double, setting.device)
            found = pgd(there, on.x, on.y, attack_on(on, case), on.rng("a"))
            single, on = deepcopy(model).float().to(setting.device), moved(batch, setting.device)
            plain = pgd(single, on.x, on.y, attack_on(on, case), on.rng("a"))
        tolerance = FACTOR * max(largest(nudged, wanted), UNIT["float64"])
        checks.append(Check(f"attacked images, {case}", "CPU float64", largest(found, wanted), tolerance))
        length = (plain - on.x).flatten(1).norm(2.0 if attack.norm == "l2" else math.inf, dim=1)
        free = attack.start_radius * attack.eps + attack.steps * attack.step_size
        outside = float((length.cpu().double() - (attack.eps if attack.ball else free)).max().clamp_min(0))
        checks.append(Check(f"outside the ball, {case}", "each image's radius", outside, OUTSIDE))
    return checks


def replays(setting: Setting) -> list[Check]:
    """Recorded attacks against the loop, bit for bit, over batches whose radii, targets, size and weights change."""
    size, checks = 6 if setting.small else 128, []
    for precision in PRECISIONS:
        for compiled in (False, True) if setting.compiled else (False,):
            name, width = ("small-cnn", 16) if compiled else ("preact-resnet18", 2 if setting.small else 16)
            model = build(name, width, device=setting.device).train()
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            engine = Engine(model, precision=precision, device=setting.device, compile=compiled, graphs=False)
            captured = CapturedAscent(engine._ascent, model, record=cuda_graph if setting.cuda else taped)
            cases = ("linf", "target") if compiled else ("linf", "l2", "target", "batch statistics", "best point")
            for case in cases:
                differ = 0
                for seed in range(4):
                    count = size if compiled or seed != 2 else size // 2
                    batch = replace(next(evaluation_batches(data_of(count), count)), seed=seed)
                    batch = moved(batch, setting.device)
                    with numerics(deterministic=True):
                        loop, found = (
                            pgd(engine.eager, batch.x, batch.y, attack_on(batch, case), batch.rng("a"), ascent=way)
                            for way in (engine._ascent, captured)
                        )
                    differ += int((loop != found).sum())
                    nudge(model, 0.01)
                how = f"replayed{', compiled' * compiled}, {precision}, {case}: pixels"
                checks.append(Check(how, "the loop", differ))
    return checks


def compiled_step(setting: Setting) -> list[Check]:
    """One compiled step of an l2 attack, which moves along the gradient, as training runs it: of the middle image."""
    if not setting.compiled:
        return []
    size = 16
    batch = next(evaluation_batches(data_of(size), size))
    model = build("preact-resnet18", 4 if setting.small else 16)

    def direction(called: Model, batch: Batch, ascent: Ascent | None) -> Tensor:
        attack = replace(attack_on(batch, "l2"), steps=1, start="zero", box=False)
        return pgd(called, batch.x, batch.y, attack, batch.rng("a"), ascent=ascent) - batch.x

    wanted = direction(deepcopy(model).double(), replace(batch, x=batch.x.double()), None)
    rounding = direction(InPrecision(deepcopy(model), "bf16", "cpu", bundled=False), batch, None)
    there = deepcopy(model).to(setting.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    engine = Engine(there, precision="bf16", device=setting.device, compile=True, batch_size=size)
    found = direction(engine.eager, moved(batch, setting.device), engine._ascent)
    tolerance = min(FACTOR * middle(rounding, wanted), HALF)
    return [Check("compiled step, bf16", "CPU float64", middle(found, wanted), tolerance)]
