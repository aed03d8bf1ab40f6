"""Attacks as users name them: `clean`, `fgsm`, `pgd-K`, `cw-K`, with options in brackets, read strictly.

All of them are settings of `robustfair.attacks.pgd`; the AutoAttack family is named in `autoattack.named`.
"PGD-20" is not one attack: the papers' codes differ in step, start and freezing. Here `pgd-K` takes steps of eps/4
(linf) from a uniform start and counts the last iterate, the most common reading (Rice, CFA, ARoW); `cw-K` keeps an
image that was fooled once at that point, as FAAL's code does, which can only lower robust accuracy; `freeze` changes
either. With restarts, `cw-K` picks by its own margin where FAAL's code picks by cross-entropy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from robustfair.attacks.autoattack.named import AUTOATTACK, AutoAttack, parse_autoattack
from robustfair.attacks.autoattack.named import OPTIONS as AUTOATTACK_OPTIONS
from robustfair.attacks.pgd import STARTS, FreezeFooled
from robustfair.config import build, require
from robustfair.errors import ConfigError, UnknownNameError
from robustfair.grammar import Term, canonical_key, format_eps, format_value, parse_term
from robustfair.losses import MaximiseCE, MaximiseMargin
from robustfair.registry import ATTACKS
from robustfair.values import Attack, Batch, Goal, Threat

OPTIONS = ("restarts", "step_size", "start", "freeze", "keep")
AUTOATTACK_NAMES = (AUTOATTACK, *AUTOATTACK_OPTIONS)
"""Names of `robustfair.attacks.autoattack.named`."""
CROSS_ENTROPY, MARGIN = "cross-entropy", "margin"
CLEAN = "clean"


@dataclass(frozen=True, kw_only=True)
class AttackKind:
    """A family of attacks by projected gradients, named with its steps: what `ATTACKS` files as "pgd" is `pgd-20`.

    Attributes:
        goal: what it maximises; a frozen dataclass without tensors.
        goal_name: the goal in a word or two, as stored audits have it.
        about: what it is, for `robustfair list attacks`; K stands for the steps.
        upwards: the goal in a sentence, after "steps up": "the cross-entropy".
        start, freeze, keep: defaults of its options, see `NamedAttack`.
        single: one step of the whole radius, so that its name has no number.
    """

    goal: Goal
    goal_name: str
    about: str
    upwards: str = ""
    start: str = "uniform"
    freeze: bool = False
    keep: Literal["last", "best"] = "last"
    single: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """Every option of `OPTIONS` as it is where a user gives none."""
        own = {"start": self.start, "freeze": self.freeze, "keep": self.keep}
        return {"restarts": 1, "step_size": None, **own}


ATTACKS.reserved = (CLEAN, *AUTOATTACK_NAMES)
ATTACKS.register("fgsm")(
    AttackKind(
        goal=MaximiseCE(),
        goal_name=CROSS_ENTROPY,
        about="one step of the full radius up the cross-entropy, from the image itself",
        start="zero",
        single=True,
    )
)
ATTACKS.register("pgd")(
    AttackKind(
        goal=MaximiseCE(),
        goal_name=CROSS_ENTROPY,
        about="K projected gradient steps up the cross-entropy; the step is eps/4 (linf) or 15/128 eps (l2)",
    )
)
ATTACKS.register("cw")(
    AttackKind(
        goal=MaximiseMargin(),
        goal_name=MARGIN,
        about="as pgd-K, up the CW margin of the logits: linf or l2 PGD, not the minimum-norm attack of that name",
        upwards="the CW margin ({norm} PGD, not the minimum-norm attack of that name)",
        freeze=True,
    )
)


@dataclass(frozen=True, kw_only=True)
class NamedAttack:
    """One attack of an audit; `parse_attacks` builds it from its name.

    Attributes:
        kind: "clean", or the family by its name in `ATTACKS`: "fgsm", "pgd" (cross-entropy), "cw" (margin), ...
        steps: gradient steps; 0 for clean, 1 for fgsm.
        restarts: independent starts, the best per image is kept.
        step_size: pixel units; None is the radius for fgsm and the step of the threat otherwise.
        start: a key of `robustfair.attacks.pgd.STARTS`.
        freeze: an image that is misclassified stays at that point.
        keep: "last" iterate, or the "best" by the goal.

    Raises:
        ConfigError: a value out of range, or restarts from a start that is always the same.
    """

    kind: str
    steps: int
    restarts: int = 1
    step_size: float | None = None
    start: str = "uniform"
    freeze: bool = False
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        owner = self._base
        require(self.steps >= (self.kind != "clean"), owner, "steps", allowed=">= 1", got=self.steps)
        require(self.restarts >= 1, owner, "restarts", allowed=">= 1", got=self.restarts)
        usable = self.step_size is None or self.step_size > 0
        require(usable, owner, "step_size", allowed="> 0", got=self.step_size)
        require(self.start in STARTS, owner, "start", allowed=f"one of {', '.join(STARTS)}", got=self.start)
        require(
            self.restarts == 1 or self.start != "zero",
            owner,
            "restarts",
            allowed="1 with start=zero",
            got=self.restarts,
            hint="Add start=uniform: every restart from the image itself is the same attack",
        )

    @property
    def name(self) -> str:
        """The canonical text, with the options that differ from the default: the key of this attack everywhere.

        >>> [attack.name for attack in parse_attacks("PGD_20(restarts=1), cw-20(alpha=1/255, restarts=5)")]
        ['pgd-20', 'cw-20(restarts=5, step_size=1/255)']
        """
        defaults = {} if self.is_clean else self._family.defaults
        given = {key: getattr(self, key) for key in defaults if getattr(self, key) != defaults[key]}
        inside = ", ".join(f"{key}={format_value(value)}" for key, value in given.items())
        return f"{self._base}({inside})" if inside else self._base

    @property
    def is_clean(self) -> bool:
        """Whether it is none: predictions on the images as they are."""
        return self.kind == "clean"

    @property
    def needs_gradient(self) -> bool:
        """Whether running it takes gradients of the model."""
        return not self.is_clean

    def on(self, batch: Batch, threat: Threat) -> Attack:
        """This attack on the images of `batch`, within `threat`.

        Raises:
            ConfigError: `clean`, which attacks nothing.
        """
        if self.kind == "clean":
            raise ConfigError("clean", "attack", allowed="fgsm, pgd-K or cw-K", got="clean")
        return Attack(
            eps=batch.x.new_full(batch.x.shape[:1], threat.eps),
            step_size=batch.x.new_full(batch.x.shape[:1], self._step(threat)),
            steps=self.steps,
            goal=self._family.goal,
            norm=threat.norm,
            start=self.start,
            stop=FreezeFooled() if self.freeze else None,
            keep=self.keep,
            restarts=self.restarts,
        )

    def settings(self, threat: Threat, classes: int | None = None) -> dict[str, Any]:
        """Everything that defines the attack, as JSON values, whatever the classes; empty for `clean`."""
        if self.kind == "clean":
            return {}
        return {
            "norm": threat.norm,
            "eps": threat.eps,
            "step_size": self._step(threat),
            "steps": self.steps,
            "start": self.start,
            "restarts": self.restarts,
            "goal": self._family.goal_name,
            "freeze": self.freeze,
            "keep": self.keep,
        }

    def describe(self, threat: Threat) -> str:
        """One line for reports.

        >>> parse_attacks("pgd-20")[0].describe(Threat())
        'pgd-20: 20 steps of 2/255 up the cross-entropy, linf radius 8/255, uniform start, 1 restart'
        """
        if self.kind == "clean":
            return "clean: the images as they are"
        steps = f"{self.steps} {'step' if self.steps == 1 else 'steps'} of {_short(self._step(threat))}"
        goal = (self._family.upwards or f"the {self._family.goal_name}").format(norm=threat.norm)
        parts = [
            f"{steps} up {goal}",
            f"{threat.norm} radius {_short(threat.eps)}",
            f"{self.start} start",
            f"{self.restarts} {'restart' if self.restarts == 1 else 'restarts'}",
            *(["fooled stay"] if self.freeze else []),
            *(["best iterate"] if self.keep == "best" else []),
        ]
        return f"{self.name}: {', '.join(parts)}"

    @property
    def _base(self) -> str:
        return self.kind if self.is_clean or self._family.single else f"{self.kind}-{self.steps}"

    @property
    def _family(self) -> AttackKind:
        found: AttackKind = ATTACKS.get(self.kind)
        return found

    def _step(self, threat: Threat) -> float:
        if self.step_size is not None:
            return self.step_size
        return threat.eps if self._family.single else threat.step_size


AnyAttack = NamedAttack | AutoAttack


def parse_attacks(attacks: str | Sequence[str]) -> tuple[AnyAttack, ...]:
    """Read a list of attacks, as text with commas between them or as a sequence of such texts.

    >>> [(attack.kind, attack.steps, attack.restarts) for attack in parse_attacks("clean, pgd-20, cw-50(restarts=5)")]
    [('clean', 0, 1), ('pgd', 20, 1), ('cw', 50, 5)]

    Raises:
        UnknownNameError: no such attack or option; shows the nearest.
        ConfigError: an option out of range, the same attack twice, or no attack at all.
        RecipeError: the text does not follow the grammar.
    """
    texts = _split(attacks if isinstance(attacks, str) else ",".join(attacks))
    parsed = tuple(_parse_one(text) for text in texts)
    require(bool(parsed), "attacks", "list", allowed="names like clean,pgd-20", got=attacks)
    names = [attack.name for attack in parsed]
    for name in names:
        require(names.count(name) == 1, "attacks", "list", allowed="each attack once", got=name)
    return parsed


def list_attacks() -> list[tuple[str, str]]:
    """(name pattern, description) of every attack."""
    return [
        (CLEAN, "the images as they are"),
        *((name if ATTACKS.get(name).single else f"{name}-K", ATTACKS.get(name).about) for name in ATTACKS),
        ("autoattack", "apgd-ce, apgd-t, fab-t and square in turn, each on what still stands; version=plus for six"),
        ("apgd-ce", "100 steps of Auto-PGD up the cross-entropy"),
        ("apgd-dlr", "the same up the difference of logits ratio"),
        ("apgd-t", "the same up its targeted form, towards 9 classes in turn"),
        ("fab", "the nearest point of another class, by linearising the network"),
        ("fab-t", "the same towards 9 classes in turn"),
        ("square", "random search by the margin alone, 5000 queries"),
    ]


def _parse_one(text: str) -> AnyAttack:
    term = parse_term(text, "attack", example="cw-50(restarts=5)", hint="separate them by commas, like 'clean,pgd-20'")
    if term.name in AUTOATTACK_NAMES:
        return parse_autoattack(term)
    kind, steps = _kind_and_steps(term)
    args = {canonical_key(key): value for key, value in term.args.items()}
    if kind == "clean" and args:
        raise ConfigError("clean", "options", allowed="none", got=", ".join(args))
    for key in args:
        if key not in (*OPTIONS, "alpha"):
            raise UnknownNameError(f"option of {term.name}", key, OPTIONS)
    defaults = {} if kind == CLEAN else ATTACKS.get(kind).defaults
    rest = {key: value for key, value in defaults.items() if key not in args and key != "step_size"}
    return build(NamedAttack, {"kind": kind, "steps": steps, **rest, **args}, owner=term.name)


def _kind_and_steps(term: Term) -> tuple[str, int]:
    if term.name == CLEAN:
        return CLEAN, 0
    if term.name in ATTACKS and ATTACKS.get(term.name).single:
        return term.name, 1
    found = re.fullmatch(r"(.+)-(\d+)", term.name)
    if found and found[1] in ATTACKS and not ATTACKS.get(found[1]).single:
        return found[1], int(found[2])
    number = re.search(r"\d+$", term.name)
    steps = number[0] if number else "20"
    known = [name if ATTACKS.get(name).single else f"{name}-{steps}" for name in ATTACKS]
    raise UnknownNameError("attack", term.name, (CLEAN, *known, *AUTOATTACK_NAMES))


def _split(text: str) -> Iterable[str]:
    """The pieces between the commas that stand outside brackets; empty pieces are left out."""
    pieces, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces if piece.strip()]


def _short(length: float) -> str:
    text = format_eps(length)
    return text if len(text) <= 8 else f"{length:.4g}"
