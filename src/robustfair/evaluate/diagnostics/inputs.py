"""Is this model fed as it was trained? A few hundred clean images tell, before hours of attacks on a wrong set-up.

Images and model may disagree on the scale of pixels in ways that no error shows: the accuracy is low, or near chance.
Every usual preparation of pixels is put in front of the model in turn; where one raises the accuracy, it is the
diagnosis. The few best are found on some images and judged on others, so that the best of many is no better than it
looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import DataError
from robustfair.evaluate.diagnostics.base import LEAST_SKILL, Diagnostic, paired_difference
from robustfair.models.head import check_outputs, in_float32, prepared, unwrap
from robustfair.models.modes import attacking
from robustfair.models.normalise import NAMED_STATISTICS, Normalise, Statistics
from robustfair.values import BATCH_NORM, seeded_generator

SAMPLE = 400
"""Images looked at, drawn from a fixed seed; a quarter of them chooses among the changes, the others confirm."""
LEAST_GAIN = 0.05
"""Gain in clean accuracy that another preparation of the pixels must exceed with the whole interval to be named."""
PASSES = 5
"""Of the same images, to see whether the output is random."""
SAME = 1e-4
"""Share of the spread of the logits by which repeated passes of a fixed model may differ."""
SAME_LOGITS = 0.02
"""Largest change of a logit with the batch it is in, in standard deviations of the logits, that is rounding."""
DARKEST = 32
"""A data set without a pixel as bright as this, of 255, was scaled before its pixels became whole numbers."""

BATCH = 100
"""Images at a time."""

_FINALISTS = 3

Change = Callable[[Tensor], Tensor]


def diagnose_model(
    model: nn.Module, dataset: ImageDataset, device: torch.device | str = "cpu", *, batch_size: int = BATCH
) -> list[Diagnostic]:
    """All diagnostics of this module, warnings first. The model is moved to `device` and keeps its modes.

    Args:
        model: (B, C, H, W) in [0, 1] -> logits (B, K).
        dataset: the images of the audit.
        device: where to run.
        batch_size: images at a time; `BATCH` at most.

    Raises:
        ModelError: outputs that do not fit the classes.
        DataError: no images.
    """
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to look at")
    first = dataset.subset(range(min(2, len(dataset)))).to(device)
    example = next(evaluation_batches(first, 2)).x
    model = prepared(in_float32(model.to(device), example), example)
    check_outputs(model, dataset.num_classes, example)
    size = min(batch_size, BATCH)
    found = [
        *diagnose_pixels(_sample(dataset, device)),
        *diagnose_normalisation(model, dataset, device, batch_size=size),
        *diagnose_outputs(model, dataset, device, batch_size=size),
        *diagnose_mode(model, dataset, device, batch_size=size),
    ]
    return sorted(found, key=lambda diagnostic: diagnostic.severity != "warn")


def diagnose_normalisation(
    model: nn.Module, dataset: ImageDataset, device: torch.device | str = "cpu", *, batch_size: int = BATCH
) -> list[Diagnostic]:
    """A usual preparation of the pixels under which the model is right more often, if there is one.

    The changes: normalisation by the statistics of CIFAR-10, ImageNet or MNIST (as the channels allow), by 0.5 and 0.5,
    of each image by its own mean and std, pixels up to 255; and normalisation undone. A model with a normalisation of
    ours has each of them in its place. The best on a quarter of the sample are judged on the rest: the paired 95 %
    interval of the gain must lie above `LEAST_GAIN`, and the accuracy above chance. Those that do as well are named.

    Returns:
        No diagnostic or one, of code "wrong-normalisation".
    """
    sample = _sample(dataset, device)
    quarter = max(1, len(sample) // 4)
    rows = torch.arange(len(sample), device=sample.device)
    screen, rest = sample.subset(rows[:quarter]), sample.subset(rows[quarter:])
    if len(rest) == 0:
        return []
    with attacking(model.to(device), "eval"), torch.no_grad():
        finalists = _finalists(model, screen, _trials(model, sample), batch_size)
        before = _hits(model, rest, batch_size) if finalists else None
        after = {trial: _tried(model, rest, batch_size, trial.change) for trial in finalists}
    if before is None:
        return []
    best = max(finalists, key=lambda trial: int(after[trial].sum()))
    _, lower, upper = paired_difference(after[best], before)
    chance = 1 / dataset.num_classes
    if lower < LEAST_GAIN or _rate(after[best]) - chance < LEAST_SKILL * (1 - chance):
        return []
    least = _rate(after[best]) - LEAST_GAIN
    others = [trial for trial in finalists if trial is not best and _rate(after[trial]) > least]
    also = "".join(f"; it is {_percent(after[trial])} when {trial.text}" for trial in others)
    return [
        Diagnostic(
            code="wrong-normalisation",
            severity="warn",
            text=f"On {len(rest)} clean images accuracy rises from {_percent(before)} to {_percent(after[best])} when "
            f"{best.text} (95 % interval of the gain {100 * lower:.1f} to {100 * upper:.1f} points){also}. "
            f"{best.verdict}",
            advice=best.advice + (" Of those that do as well, take the one that its authors name." if others else ""),
        )
    ]


def diagnose_outputs(
    model: nn.Module, dataset: ImageDataset, device: torch.device | str = "cpu", *, batch_size: int = BATCH
) -> list[Diagnostic]:
    """Outputs that look like probabilities: every row within [0, 1] and summing to one; code "probabilities"."""
    logits = _logits(model.to(device), _few(dataset, device, batch_size))
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    if not inside or not torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-3):
        return []
    return [
        Diagnostic(
            code="probabilities",
            severity="warn",
            text="The outputs look like probabilities: every row lies in [0, 1] and sums to one. A softmax saturates, "
            "so gradient attacks stall on it, and the DLR loss and margins are made for logits.",
            advice="Return the logits: leave the softmax out of the model.",
        )
    ]


def diagnose_mode(
    model: nn.Module, dataset: ImageDataset, device: torch.device | str = "cpu", *, batch_size: int = BATCH
) -> list[Diagnostic]:
    """A model in train mode, or one that behaves so in eval mode; codes "train-mode" and "random-output".

    Behaving so is: other logits for the same images each time, as under dropout, or logits that depend on the other
    images of the batch, as under batch statistics.
    """
    found = []
    layers = [m for m in model.modules() if m.training and isinstance(m, BATCH_NORM | _DropoutNd)]
    if layers:
        found.append(
            Diagnostic(
                code="train-mode",
                severity="note",
                text=f"The model came in train mode ({len(layers)} batch-norm or dropout layers); the audit sets it to "
                "eval mode.",
                advice="Call model.eval() before measuring it elsewhere.",
            )
        )
    x = _few(dataset, device, batch_size)
    random = diagnose_randomness(model.to(device), x)
    if random or not _differ(_logits(model, x), torch.cat([_logits(model, half) for half in x.chunk(2)])):
        return [*random, *found]
    diagnostic = Diagnostic(
        code="train-mode",
        severity="warn",
        text="The logits of an image depend on the other images of its batch, although the model is in eval mode: its "
        "accuracy is not that of a fixed function.",
        advice="Batch norm without running statistics, or another layer over the batch, acts as in training; make it "
        "follow model.eval().",
    )
    return [diagnostic, *found]


def diagnose_randomness(model: nn.Module, x: Tensor) -> list[Diagnostic]:
    """Whether the same images give other logits at every pass, in eval mode; code "random-output".

    Args:
        model: on the device of `x`; it keeps its modes.
        x: (B, C, H, W) in [0, 1].
    """
    passes = torch.stack([_logits(model, x) for _ in range(PASSES)])
    spread = float((passes[0].amax(1) - passes[0].amin(1)).mean())
    apart = float((passes - passes[0]).abs().amax())
    if apart <= SAME * max(spread, 1e-12):
        return []
    changed = int((passes.argmax(2) != passes[0].argmax(1)).any(0).sum())
    return [
        Diagnostic(
            code="random-output",
            severity="warn",
            text=f"The same images give other logits at every pass: up to {apart:.2g} apart in {PASSES} passes, where "
            f"logits spread over {spread:.2g}; {changed} of {len(x)} predictions change.",
            advice="Attacks must average over the randomness, which none here does: audit the model without it, or "
            "read every figure as an upper bound.",
        )
    ]


def diagnose_pixels(dataset: ImageDataset) -> list[Diagnostic]:
    """Images that are all but black, as pixels of [0, 1] become when stored as whole numbers; code "dark-images"."""
    brightest = int(dataset.images.max())
    if brightest >= DARKEST:
        return []
    return [
        Diagnostic(
            code="dark-images",
            severity="warn",
            text=f"The brightest pixel is {brightest} of 255: the images look scaled before they were stored as bytes.",
            advice="Store the pixels from 0 to 255; the model's own normalisation does the rest.",
        )
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trial:
    """One preparation of the pixels in front of the model: what to say where it helps."""

    change: Change
    text: str
    verdict: str
    advice: str


def _finalists(model: nn.Module, data: ImageDataset, trials: Sequence[_Trial], batch_size: int) -> list[_Trial]:
    """The trials under which the model is right most often, few and close to each other; none if none gains much.

    The model is in eval mode already.
    """
    margin = LEAST_GAIN * len(data)
    given = int(_hits(model, data, batch_size).sum())
    if given + margin > len(data):
        return []
    right = {trial: int(_tried(model, data, batch_size, trial.change).sum()) for trial in trials}
    most = max(right.values())
    if most < given + margin:
        return []
    ordered = sorted(trials, key=lambda trial: -right[trial])
    return [trial for trial in ordered[:_FINALISTS] if right[trial] >= most - margin]


def _trials(model: nn.Module, dataset: ImageDataset) -> list[_Trial]:
    """The changes to try on this model. Those of a model with its own statistics stand in place of them."""
    channels = dataset.images.shape[1]
    usual = {name: pair for name, pair in NAMED_STATISTICS.items() if len(pair[0]) == channels and name != "cifar100"}
    usual["half"] = ((0.5,) * channels, (0.5,) * channels)
    normalise = getattr(unwrap(model), "normalise", None)
    own = normalise.statistics() if isinstance(normalise, Normalise) else None
    if own == ((0.0,) * channels, (1.0,) * channels):
        own = None
    undo, instead = (_undone(own), " in place of the model's own normalisation") if own else (_same, "")
    backward = {"own": own} if own else usual
    return [
        *(_backward(name, _undone(pair)) for name, pair in backward.items()),
        *(_forward(name, _then(_done(pair), undo), instead) for name, pair in usual.items() if pair != own),
        _Trial(
            change=_then(lambda x: 255 * x, undo),
            text=f"pixels run from 0 to 255{instead}",
            verdict="This model expects pixels up to 255.",
            advice="Multiply its input by 255 in its factory; an audit gives images in [0, 1].",
        ),
        _Trial(
            change=_then(_standardised, undo),
            text=f"each image is normalised by its own mean and std{instead}",
            verdict="This model expects images standardised one by one.",
            advice="Put that in front of the network in its factory.",
        ),
    ]


def _forward(name: str, change: Change, instead: str) -> _Trial:
    return _Trial(
        change=change,
        text=f"the images are normalised by the statistics {name!r}{instead}",
        verdict="This model expects input that is normalised so.",
        advice=f"Pass --normalise {name}, or put the network behind robustfair.models.Normalised.",
    )


def _backward(name: str, change: Change) -> _Trial:
    which = "the model's own normalisation" if name == "own" else f"a normalisation by the statistics {name!r}"
    return _Trial(
        change=change,
        text=f"{which} is undone in front of it",
        verdict="This model normalises what it expects as it is, or normalises twice.",
        advice="Pass --normalise none, or leave one normalisation out of its factory.",
    )


def _same(x: Tensor) -> Tensor:
    return x


def _done(statistics: Statistics) -> Change:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
    return lambda x: (x - mean.to(x)) / std.to(x)


def _undone(statistics: Statistics) -> Change:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
    return lambda x: x * std.to(x) + mean.to(x)


def _standardised(x: Tensor) -> Tensor:
    """Every image (C, H, W) of the batch to mean 0 and std 1; the std is at least that of one grey level in 255."""
    std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True, correction=0)
    return (x - mean) / std.clamp(min=1 / 255)


def _then(first: Change, second: Change) -> Change:
    return lambda x: second(first(x))


def _sample(dataset: ImageDataset, device: torch.device | str) -> ImageDataset:
    """Up to `SAMPLE` images in a random order that depends on their number alone, on `device`."""
    rows = torch.randperm(len(dataset), generator=seeded_generator("cpu", "normalisation", len(dataset)))
    return dataset.subset(rows[:SAMPLE]).to(device)


def _few(dataset: ImageDataset, device: torch.device | str, batch_size: int) -> Tensor:
    """(B, C, H, W) in [0, 1], as many of the sample as make one batch."""
    return next(evaluation_batches(_sample(dataset, device), batch_size)).x


def _rate(hits: Tensor) -> float:
    return float(hits.float().mean())


def _percent(hits: Tensor) -> str:
    return f"{100 * _rate(hits):.1f} %"


def _hits(model: nn.Module, dataset: ImageDataset, batch_size: int, change: Change = _same) -> Tensor:
    """(N,) bool on the CPU: right on the changed images. The model is in eval mode already."""
    columns = [model(change(batch.x)).argmax(1) == batch.y for batch in evaluation_batches(dataset, batch_size)]
    return torch.cat(columns).cpu()


def _tried(model: nn.Module, dataset: ImageDataset, batch_size: int, change: Change) -> Tensor:
    """`_hits`, none of them where the model refuses pixels outside [0, 1]."""
    try:
        return _hits(model, dataset, batch_size, change)
    except Exception:  # a foreign module may raise anything on an input it was not made for
        return torch.zeros(len(dataset), dtype=torch.bool)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with attacking(model, "eval"), torch.no_grad():
        return model(x).float().cpu()


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > SAME_LOGITS * a.std().clamp(min=1e-12))
