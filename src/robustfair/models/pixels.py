"""Which preparation of its pixels a model was trained on: every usual one is put in front of it in turn.

Images and model may disagree on the scale of pixels in ways that no error shows: the accuracy is low, or near chance.
Where a preparation raises the accuracy, it is what the model expects. The few best are found on some images and judged
on others, so that the best of many is no better than it looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustfair import metrics
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.models.head import unwrap
from robustfair.models.modes import attacking
from robustfair.models.normalise import NAMED_STATISTICS, Normalise, Statistics
from robustfair.values import seeded_generator

SAMPLE = 400
"""Images looked at, drawn from a fixed seed; a quarter of them chooses among the changes, the others confirm."""
LEAST_GAIN = 0.05
"""Gain in clean accuracy that another preparation of the pixels must exceed with the whole interval to be named."""
LEAST_SKILL = 0.1
"""Clean accuracy above chance, as a share of what is possible above chance, below which a model looks untrained."""
BATCH = 100
"""Images at a time."""

_FINALISTS = 3

Change = Callable[[Tensor], Tensor]


class Expected(NamedTuple):
    """A preparation under which a model is right more often: what was found, in numbers, and what to do."""

    text: str
    advice: str


def expected_preparation(
    model: nn.Module, dataset: ImageDataset, device: torch.device | str = "cpu", *, batch_size: int = BATCH
) -> Expected | None:
    """A usual preparation of the pixels under which the model is right more often, if there is one.

    The changes: normalisation by the statistics of CIFAR-10, ImageNet or MNIST (as the channels allow), by 0.5 and 0.5,
    of each image by its own mean and std, pixels up to 255; and normalisation undone. A model with a normalisation of
    ours has each of them in its place. The best on a quarter of the sample are judged on the rest: the paired 95 %
    interval of the gain must lie above `LEAST_GAIN`, and the accuracy above chance. Those that do as well are named.
    """
    sample = sample_of(dataset, device)
    quarter = max(1, len(sample) // 4)
    rows = torch.arange(len(sample), device=sample.device)
    screen, rest = sample.subset(rows[:quarter]), sample.subset(rows[quarter:])
    if len(rest) == 0:
        return None
    with attacking(model.to(device), "eval"), torch.no_grad():
        finalists = _finalists(model, screen, _trials(model, sample), batch_size)
        before = _hits(model, rest, batch_size) if finalists else None
        after = {trial: _tried(model, rest, batch_size, trial.change) for trial in finalists}
    if before is None:
        return None
    best = max(finalists, key=lambda trial: int(after[trial].sum()))
    only_before, only_after = int((before & ~after[best]).sum()), int((after[best] & ~before).sum())
    lower, upper = metrics.paired_interval(only_before, only_after, len(rest))
    chance = 1 / dataset.num_classes
    if lower < LEAST_GAIN or _rate(after[best]) - chance < LEAST_SKILL * (1 - chance):
        return None
    least = _rate(after[best]) - LEAST_GAIN
    others = [trial for trial in finalists if trial is not best and _rate(after[trial]) > least]
    also = "".join(f"; it is {_percent(after[trial])} when {trial.text}" for trial in others)
    return Expected(
        f"On {len(rest)} clean images accuracy rises from {_percent(before)} to {_percent(after[best])} when "
        f"{best.text} (95 % interval of the gain {100 * lower:.1f} to {100 * upper:.1f} points){also}. {best.verdict}",
        best.advice + (" Of those that do as well, take the one that its authors name." if others else ""),
    )


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
        advice=f"Pass `normalise='{name}'`, or put the network behind robustfair.models.Normalised.",
    )


def _backward(name: str, change: Change) -> _Trial:
    which = "the model's own normalisation" if name == "own" else f"a normalisation by the statistics {name!r}"
    return _Trial(
        change=change,
        text=f"{which} is undone in front of it",
        verdict="This model normalises what it expects as it is, or normalises twice.",
        advice="Pass `normalise='none'`, or leave one normalisation out of its factory.",
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


def sample_of(dataset: ImageDataset, device: torch.device | str) -> ImageDataset:
    """Up to `SAMPLE` images in a random order that depends on their number alone, on `device`."""
    rows = torch.randperm(len(dataset), generator=seeded_generator("cpu", "normalisation", len(dataset)))
    return dataset.subset(rows[:SAMPLE]).to(device)


def hits_of(model: nn.Module, dataset: ImageDataset, batch_size: int = BATCH) -> Tensor:
    """(N,) bool on the CPU: right on the images as they are, in eval mode."""
    with attacking(model, "eval"), torch.no_grad():
        return _hits(model, dataset, batch_size)


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
