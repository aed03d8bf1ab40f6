"""CSR ("Enhancing robust fairness via confusional spectral regularization"): lower the spectral norm of the confusions.

    C_ij   share of class j that is predicted as i under attack; 0 on the diagonal                       eq. (1)
    d||C||_2 / dC_ij = u_i v_j, u and v the top singular vectors of C, taken for constants                  (9), (11)
    L_ij   mean over class j of CE(z + gamma (1 - e_y), y) over its images confused with i                  (10)
    J = E loss + alpha sum_ij u_i v_j L_ij                                                                  (12)

C is counted once an epoch, before it, over the augmented training images under PGD-10 in eval mode; under `standard`,
which has no attack, over the images as they are (tables 7 and 9), where z is at x. Two modes, which differ in much:

    paper     (12) as it stands: confused images alone, each with u_i v_y N / m_y, which is C u_i v_y on balanced data
    official  the authors' code: every image, with G[predicted, y], G = u v^T brought to [0.01, 2.01]; the term is
              G log G + G CE(z, y), whose gradient is that of G CE; the label term keeps 1 - alpha of its weight

u and v are non-negative (Perron-Frobenius); where the top singular value is not simple, any of its vectors may be
taken, and their absolute values are some. Without errors there is no direction, and the term is left out. The term is
one number of the batch, as alpha Psi is in (12): methods that weigh classes beside it weigh the loss, and not it.

From scratch no script was published. alpha = 0 is the paper's PGD-AT row, so the base is `pgd-at`, and what keeps
1 - alpha of its weight is its label term, at x', in place of the clean cross-entropy of TRADES.

Departures from the code: C has rates, where theirs has counts, which point the same way on balanced data
(`normalise=False`); gamma is 0, where their constant shrinks the true logit by a tenth; an image whose true logit only
ties with another counts as confused, as in eq. (1); one clean and one attacked pass, where the script on TRADES makes
two of each; any number of classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfair.config import Bounds, Count, NonNegative, config, require
from robustfair.losses import at_least_float32, label_loss
from robustfair.methods.base import Method, Run
from robustfair.metrics import confusion_pred_true, confusion_rates_pred_true
from robustfair.registry import METHODS
from robustfair.values import Attack, Batch, Loss, State

GammaKind = Literal["additive", "relative"]


def shifted(logits: Tensor, y: Tensor, gamma: float, kind: GammaKind) -> Tensor:
    """(B, C) logits in which the true class has to win by a margin: z + gamma (1 - e_y), or z_y less gamma z_y.

    The relative shift raises a negative z_y, as in the authors' code.

    >>> shifted(torch.tensor([[2.0, 1.0]]), torch.tensor([0]), 0.5, "additive").tolist()
    [[2.0, 1.5]]
    >>> shifted(torch.tensor([[2.0, 1.0]]), torch.tensor([0]), 0.5, "relative").tolist()
    [[1.0, 1.0]]
    """
    true = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return logits + gamma * (1 - true) if kind == "additive" else logits - gamma * true * logits


def confused_with(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) the best wrong class where it reaches the true one, else y. Needs C >= 2.

    >>> confused_with(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]]), torch.tensor([0, 0])).tolist()
    [0, 1]
    """
    rival_logit, rival = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf).max(1)
    return torch.where(logits.gather(1, y[:, None]).squeeze(1) <= rival_logit, rival, y)


def spectral_gradient(confusion_pred_true: Tensor) -> Tensor:
    """u v^T (C, C) float64 of a non-negative matrix: the derivative of its largest singular value, non-negative.

    >>> spectral_gradient(torch.tensor([[0.0, 0.0], [3.0, 0.0]])).tolist()
    [[0.0, 0.0], [1.0, 0.0]]
    """
    u, _, vh = torch.linalg.svd(confusion_pred_true.double())
    return u[:, :1].abs() * vh[:1].abs()


def spread(gradient: Tensor, low: float = 0.01, width: float = 2.0) -> Tensor:
    """The entries (C, C) of a spectral gradient brought to [low, low + width]; ones where all of them are equal.

    >>> spread(torch.tensor([[0.0, 0.5], [1.0, 0.0]]))
    tensor([[0.0100, 1.0100],
            [2.0100, 0.0100]])
    """
    least, most = gradient.min(), gradient.max()
    flat = most - least <= 1e-9 * most
    return torch.where(flat, 1.0, width * (gradient - least) / (most - least) + low)


@METHODS.register("csr")
@config
class CSR(Method):
    """Weigh the cross-entropy of an image by what its confusion adds to the spectral norm of the confusion matrix.

    Attributes:
        mode: "official" or "paper", see above.
        alpha: weight of the term; at most 1 where the label term keeps 1 - alpha.
        gamma: margin by which an image must be right not to count as confused; also in the term itself under "paper".
        gamma_kind: "additive" (logits of the other classes rise by gamma) or "relative" (the true one falls by a share
            gamma); None is the mode's own: relative under "official", additive under "paper".
        keep_base_weight: keep the label term whole; None does so under "paper" alone.
        normalise: divide the columns of C by the class counts. False takes counts, under "official" only.
        adversary: for C, "pgd-10" on cross-entropy at the objective's radius, or "training": the objective's attack.
        refresh: epochs from one count of C to the next.
        share: of the training images to count C on, in (0, 1], the first that the coming epoch draws.
    """

    name: ClassVar[str] = "csr"
    needs: ClassVar[frozenset[str]] = frozenset({"label"})
    mode: Literal["official", "paper"] = "official"
    alpha: NonNegative = 0.3
    gamma: NonNegative = 0.0
    gamma_kind: GammaKind | None = None
    keep_base_weight: bool | None = None
    normalise: bool = True
    adversary: Literal["pgd-10", "training"] = "pgd-10"
    refresh: Count = 1
    share: Annotated[float, Bounds(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        fits = self.keeps_base or self.alpha <= 1
        allowed = "in [0, 1] where the label term keeps 1 - alpha of its weight"
        hint = "Add keep_base_weight=true for more"
        require(fits, self.name, "alpha", allowed=allowed, got=self.alpha, hint=hint)
        fits = self.normalise or self.mode == "official"
        require(fits, self.name, "normalise", allowed="true in mode paper, whose term is made of rates", got=False)

    @property
    def keeps_base(self) -> bool:
        """Whether the label term keeps its weight."""
        return self.mode == "paper" if self.keep_base_weight is None else self.keep_base_weight

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"loss.spectral"} | (set() if self.keeps_base else {"loss.label"}))

    def at_epoch(self, state: State, run: Run) -> State:
        if run.finished or run.epoch % self.refresh:
            return state
        counts = self._counts(run)
        rates = confusion_rates_pred_true(counts).nan_to_num(nan=0.0)
        gradient = spectral_gradient(rates if self.normalise else counts.double().fill_diagonal_(0))
        if self.mode == "official":
            weights = spread(gradient)
        else:
            weights = gradient * (counts.sum() / counts.sum(0).clamp(min=1))
            weights = weights.masked_fill(torch.eye(run.num_classes, device=weights.device).bool(), 0.0)
        return {"weights_pred_true": weights, "alpha": self.alpha * (rates > 0).any().double()}

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        logits = loss.out.clean if loss.out.adv is None else loss.out.adv
        assert logits is not None, "an objective computes its loss from the logits of a pass"
        logits, y = at_least_float32(logits), batch.y
        if self.mode == "paper":
            logits = shifted(logits, y, self.gamma, self._gamma_kind)
        g = state["weights_pred_true"][confused_with(logits.detach(), y), y].to(logits.dtype)
        term = g * label_loss(logits, batch)
        if self.mode == "official":
            term = term + torch.xlogy(g, g)
        alpha = state["alpha"].to(loss.weight.dtype)
        base = loss if self.keeps_base else loss.scaled("label", (1 - alpha).expand_as(loss.weight))
        return base.plus("spectral", term.mean(), alpha)

    def remark(self, epochs: int) -> str | None:
        return "csr(alpha=0) does nothing but count confusions: drop csr" if self.alpha == 0 else None

    def _counts(self, run: Run) -> Tensor:
        """(C, C) int64 predictions of the training images as the coming epoch will see them, under the margin."""
        objective = run.objective

        def attack_on(batch: Batch) -> Attack:
            chosen = objective.evaluation_attack(batch) if self.adversary == "pgd-10" else None
            chosen = objective.attacks(batch)["x_adv"] if chosen is None else chosen
            return replace(chosen, start="uniform-unclipped") if self.adversary == "pgd-10" else chosen

        attacks = "x_adv" in objective.reads
        counts = torch.zeros(run.num_classes, run.num_classes, dtype=torch.int64, device=run.device)
        seen, wanted = 0, self.share * len(run.labels)
        for batch in run.batches("train", attack_on if attacks else None):
            logits = at_least_float32(run.predict(batch.x if batch.x_adv is None else batch.x_adv))
            predicted = confused_with(shifted(logits, batch.y, self.gamma, self._gamma_kind), batch.y)
            counts = counts + confusion_pred_true(predicted, batch.y, run.num_classes, check=False)
            seen += len(batch.y)
            if seen >= wanted:
                break
        return run.total(counts)

    @property
    def _gamma_kind(self) -> GammaKind:
        return self.gamma_kind or ("relative" if self.mode == "official" else "additive")
