"""What a training run is at an epoch boundary: all that must be saved for it to go on exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from robustfair.values import ClassTally, State, StateDict


@dataclass(frozen=True)
class ScoredWeights:
    """The weights of a candidate at one epoch, and its score on the validation split.

    Attributes:
        candidate: "model" (the raw weights) or the name of an export, such as "ema".
        epoch: epochs completed when it was measured.
        score: of the selection rule, a fraction.
        weights: its state dict.
        clean: the same rule on clean images, by which equal scores are told apart; nan if it is not known.
    """

    candidate: str
    epoch: int
    score: float
    weights: StateDict
    clean: float = math.nan


@dataclass(frozen=True)
class TrainState:
    """A run after `epoch` completed epochs.

    There is no random state: every draw is keyed by the seed and its position, so the number of the epoch is enough.

    Attributes:
        epoch, step: epochs and optimizer steps completed.
        weights: state dict of the model.
        optimizer: momentum buffers and moments as `parameter/key`.
        methods: state of each method by its name.
        networks: weights of the networks that train beside the model, as "method/name".
        frozen: those of the ones that do not, which stay what they were when the run began.
        objective: name of the objective; None in states of earlier versions.
        exports: candidates exported at this boundary ("ema": its weights).
        best: the selected candidate, None without selection.
        train: counts of the last epoch, from the passes that trained.
        history: one record per completed epoch.
    """

    epoch: int
    step: int
    weights: StateDict
    optimizer: Mapping[str, Tensor]
    methods: Mapping[str, State]
    networks: Mapping[str, StateDict] = field(default_factory=dict)
    frozen: Mapping[str, StateDict] = field(default_factory=dict)
    objective: str | None = None
    exports: Mapping[str, StateDict] = field(default_factory=dict)
    best: ScoredWeights | None = None
    train: ClassTally | None = None
    history: tuple[Mapping[str, Any], ...] = ()
