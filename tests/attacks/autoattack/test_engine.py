from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from robustfair.attacks.autoattack.apgd import Apgd
from robustfair.attacks.autoattack.base import TOLERANCES, Search, SearchNetwork, distance
from robustfair.attacks.autoattack.engine import UNBROKEN, AttackResult, Ensemble
from robustfair.attacks.autoattack.fab import Fab
from robustfair.attacks.autoattack.named import Member
from robustfair.attacks.autoattack.square import Square
from robustfair.errors import ModelError
from robustfair.execution.precision import InPrecision
from robustfair.values import Threat

Build = Callable[..., Any]
EPS = {"linf": 0.02, "l2": 0.12}


def searches(norm: Any, eps: float | None = None) -> list[Search]:
    """One of each kind, short, in the order of AutoAttack."""
    ball = {"eps": EPS[norm] if eps is None else eps, "norm": norm}
    return [
        Apgd(name="apgd-ce", loss="ce", steps=4, **ball),
        Apgd(name="apgd-t", loss="dlr-targeted", steps=5, restarts=3, **ball),
        Fab(name="fab-t", targeted=True, steps=5, restarts=3, **ball),
        Square(name="square", queries=12, restarts=2, **ball),
    ]


def ensemble_on(
    scene: Any, attacks: list[Search], *, batch_size: int = 4, network: SearchNetwork | None = None
) -> Ensemble:
    images, keys = lambda rows: scene.x[rows], torch.arange(len(scene.y)) + 100
    network = network or SearchNetwork(scene.model)
    eps, norm = attacks[0].eps, attacks[0].norm  # type: ignore[attr-defined]
    examples = {"images": images, "labels": scene.y, "keys": keys}
    return Ensemble(scene.model, network, attacks, **examples, eps=eps, norm=norm, seed=5, batch_size=batch_size)


def assert_same(one: AttackResult, two: AttackResult) -> None:
    assert torch.equal(one.prediction, two.prediction)
    assert torch.equal(one.broken_by, two.broken_by)
    assert one.points.keys() == two.points.keys()
    assert all(torch.equal(one.points[row], two.points[row]) for row in one.points)
    assert one.not_finite == two.not_finite


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_results_do_not_depend_on_the_batch_size(scene: Build, norm: str, number: int) -> None:
    """In a large batch all restarts of an example run side by side, in one of one they follow each other."""
    many = scene(16, seed=1).one_by_one()
    attack = searches(norm, 2 * EPS[norm])[number]
    alone = ensemble_on(many, [attack], batch_size=1).run()
    assert 0 < len(alone.points) < 16
    for batch_size in (3, 200):
        assert_same(ensemble_on(many, [attack], batch_size=batch_size).run(), alone)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_results_do_not_depend_on_the_other_examples(scene: Build, norm: str) -> None:
    many = scene(12, seed=1).one_by_one()
    whole = ensemble_on(many, searches(norm)).run()
    half = ensemble_on(many, searches(norm))
    rows = torch.tensor([7, 2, 9])
    examples = {"images": lambda at: many.x[rows[at]], "labels": many.y[rows], "keys": rows + 100}
    part = Ensemble(many.model, half.network, half.searches, **examples, eps=EPS[norm], norm=norm, seed=5, batch_size=2)
    found = part.run()
    assert torch.equal(found.prediction, whole.prediction[rows])
    assert torch.equal(found.broken_by, whole.broken_by[rows])
    assert all(torch.equal(point, whole.points[int(rows[at])]) for at, point in found.points.items())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_goes_on_exactly_where_it_was_stopped(scene: Build, norm: str) -> None:
    few = scene(9, seed=2, dtype=torch.float32)
    few.x = few.x.contiguous(memory_format=torch.channels_last)
    few.model = few.model.to(memory_format=torch.channels_last)
    iterations = count()
    whole = ensemble_on(few, searches(norm)).run(lambda _: next(iterations) >= 0)
    assert 0 < len(whole.points) < 9
    total, members = next(iterations), set()
    for stop in range(1, total, 4):
        first, ahead, behind = ensemble_on(few, searches(norm)), count(1), count()
        first.run(lambda _, ahead=ahead, stop=stop: next(ahead) < stop)
        members.add(first.member)
        second = ensemble_on(few, searches(norm))
        second.restore(load(save(first.state())))
        assert second.ran() == first.ran()
        assert_same(second.run(lambda _, behind=behind: next(behind) >= 0), whole)
        assert stop + next(behind) == total
        assert second.finished
    assert members == {0, 1, 2, 3}


def test_journals_keep_their_keys(scene: Build) -> None:
    """A journal that an earlier version left has these, and is gone on with."""
    ensemble = ensemble_on(scene(6, seed=2), searches("linf"))
    ensemble.run(lambda _: False)
    kept = {key for key in ensemble.state() if "point" not in key}
    assert {"prediction", "broken_by", "broken_in", "not_finite", "member", "queue/examples", "queue/position"} < kept
    assert {"lanes/example", "lanes/round", "lanes/turns", "lanes/tested", "lanes/judged", "lanes/target"} < kept


def test_a_finished_ensemble_restores_as_finished(scene: Build) -> None:
    few = scene(4)
    first = ensemble_on(few, searches("linf"))
    result = first.run()
    second = ensemble_on(few, searches("linf"))
    second.restore(load(save(first.state())))
    assert second.finished
    assert_same(second.run(), result)


@given(
    channels=st.sampled_from([1, 3]),
    classes=st.integers(2, 100),
    size=st.sampled_from([(4, 4), (5, 7), (6, 3)]),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.sampled_from([0.0, 1e-3, 1 / 255, 8 / 255, 0.3, 1.0]),
    kinds=st.lists(
        st.sampled_from(["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    batch_size=st.integers(1, 12),
    bf16=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_point_is_in_ball_and_box_and_misclassified(
    scene: Build,
    channels: int,
    classes: int,
    size: tuple[int, int],
    norm: Any,
    eps: float,
    kinds: list[Any],
    batch_size: int,
    bf16: bool,
    seed: int,
) -> None:
    many = scene(6, channels=channels, classes=classes, size=size, seed=seed, dtype=torch.float32).one_by_one()
    clean = many.x.clone()
    members = [Member(kind=kind, steps=3, targets=4, restarts=2, queries=8) for kind in kinds]
    attacks = [member.search(Threat(norm=norm, eps=eps), classes, seed) for member in members]
    network = SearchNetwork(InPrecision(many.model, "bf16", "cpu"), TOLERANCES["bf16"]) if bf16 else None
    result = ensemble_on(many, attacks, batch_size=batch_size, network=network).run()
    assert torch.equal(many.x, clean)
    broken = (result.broken_by != UNBROKEN).nonzero().squeeze(1).tolist()
    assert sorted(result.points) == broken
    assert torch.equal((result.prediction != many.y).nonzero().squeeze(1), torch.tensor(broken, dtype=torch.long))
    assert eps > 0 or not broken
    for row in broken:
        point = result.points[row][None]
        assert (point.dtype, point.shape) == (many.x.dtype, many.x[:1].shape)
        assert point.min() >= 0
        assert point.max() <= 1
        assert distance(many.x[row : row + 1], point, norm) <= eps + 1e-6
        assert int(many.model(point).argmax()) == result.prediction[row] != many.y[row]
        assert 0 <= result.broken_by[row] < len(attacks)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.1 / 255, 1 / 255, 4 / 255, 8 / 255])
def test_small_radii_are_searched_in_float32(scene: Build, norm: Any, eps: float) -> None:
    """A pixel and a small radius add up to a rounded number: nearly all points of a search lie outside by a rounding,
    and would be lost if that had to be a small share of the radius."""
    rng = torch.Generator().manual_seed(0)
    middle = 0.3 + 0.4 * torch.rand(3, 16, 16, generator=rng)
    pattern = 2.0 * torch.randint(2, (3, 16, 16), generator=rng) - 1
    apart = torch.tensor([0.2, 0.5, 0.9, 1.1, 2.0]) * eps / (1 if norm == "linf" else pattern.norm())

    def model(x: Tensor) -> Tensor:
        lead = ((x - middle) * pattern).flatten(1).mean(1) / eps
        return torch.stack([torch.zeros_like(lead), lead], 1)

    x = middle + apart[:, None, None, None] * pattern
    flat = replace(scene(), model=model, x=x, y=torch.ones(5, dtype=torch.long))
    for attack in (
        Apgd(name="apgd", loss="ce", eps=eps, norm=norm, steps=12),
        Fab(name="fab", targeted=True, eps=eps, norm=norm, steps=12),
    ):
        assert ensemble_on(flat, [attack]).run().broken_by.tolist() == [0, 0, 0, UNBROKEN, UNBROKEN]


class Watched(nn.Module):
    """Notes which of the flat examples of `grey` the images that come belong to, while they stay near."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.mean((1, 2, 3)) * 10 - 1).round().long().tolist())
        return self.model(x)


@pytest.fixture
def grey(scene: Build) -> Any:
    """Eight flat images a tenth of grey apart, near the boundaries of a network."""
    few = scene(8, channels=1, classes=4, seed=3)
    few.x = ((torch.arange(8) + 1) / 10).double().view(8, 1, 1, 1).repeat(1, 1, 5, 5)
    few.model.head.bias -= few.model(few.x).mean(0)
    few.y = few.model(few.x).argmax(1)
    return few


def test_what_is_broken_is_never_searched_again(grey: Any) -> None:
    watched = Watched(grey.model)
    near = [search for search in searches("linf", 0.03) if not isinstance(search, Fab)]
    ensemble = ensemble_on(grey, near, batch_size=2, network=SearchNetwork(watched))
    broken_at: dict[int, int] = {}

    def note(running: Ensemble) -> bool:
        for row in running.result.points:
            broken_at.setdefault(row, len(watched.seen))
        return True

    ensemble.run(note)
    assert 0 < len(broken_at) < 8
    for row, at in broken_at.items():
        assert all(row not in images for images in watched.seen[at:])
    for row in set(range(8)) - set(broken_at):
        assert sum(images.count(row) for images in watched.seen) == sum(a.restarts * a.iterations for a in near)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_the_batch_holds_what_stands_and_what_an_earlier_restart_may_break(scene: Build, batch_size: int) -> None:
    def note(running: Ensemble) -> bool:
        if running.active:
            broken_in = running.broken_in[running.active["example"]]
            assert (running.active["restart"] < broken_in).all()
            assert len(broken_in) <= batch_size
        return True

    result = ensemble_on(scene(16, seed=1), searches("linf"), batch_size=batch_size).run(note)
    assert len(result.points) > 4


def test_broken_by_is_the_number_of_the_search(scene: Build) -> None:
    """A search that cannot move finds nothing; the one after it is named."""
    many = scene(10, seed=1)
    still = Apgd(name="still", loss="ce", eps=0.0, norm="linf", steps=3)
    strong = Apgd(name="strong", loss="ce", eps=0.3, norm="linf", steps=10)
    ensemble = ensemble_on(many, [strong, strong])
    ensemble.searches = (still, strong, Square(name="square", eps=0.3, norm="linf", queries=5))
    result = ensemble.run()
    assert (result.broken_by == 1).sum() >= 8
    assert (result.broken_by != 0).all()


def test_targets_are_the_likeliest_other_classes(scene: Build) -> None:
    few = scene(5, classes=5, seed=4)
    with torch.no_grad():
        logits = few.model(few.x).tolist()
    attack = Apgd(name="apgd-t", loss="ce-targeted", eps=1e-6, norm="linf", steps=1, restarts=4)
    ensemble, seen = ensemble_on(few, [attack]), {}

    def note(running: Ensemble) -> bool:
        columns = (running.active[name].tolist() for name in ("example", "restart", "target") if running.active)
        seen.update({(row, restart): target for row, restart, target in zip(*columns, strict=True)})
        return True

    ensemble.run(note)
    for row, z in enumerate(logits):
        ranked = sorted((k for k in range(5) if k != int(few.y[row])), key=lambda k: -z[k])
        assert [seen[row, restart] for restart in range(4)] == ranked


def test_fewer_classes_than_targets(scene: Build) -> None:
    few = scene(6, classes=3, seed=5)
    for kind in ("apgd-t", "fab-t"):
        search = Member(kind=kind, steps=3).search(Threat(norm="linf", eps=0.05), 3, 0)
        assert search.restarts == 2
        assert ensemble_on(few, [search]).run().prediction.max() <= 2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bf16_breaks_only_what_float32_confirms(scene: Build, norm: str) -> None:
    many = scene(40, classes=10, size=(8, 8), seed=6, dtype=torch.float32).one_by_one()
    low = SearchNetwork(InPrecision(many.model, "bf16", "cpu"), TOLERANCES["bf16"])
    found, full = ensemble_on(many, searches(norm), network=low).run(), ensemble_on(many, searches(norm)).run()
    assert len(found.points) > 5
    for row, point in found.points.items():
        assert int(many.model(point[None]).argmax()) == found.prediction[row] != many.y[row]
    broken = [set(result.points) for result in (found, full)]
    assert len(broken[0] ^ broken[1]) <= 2


def test_a_search_that_lies_breaks_nothing(scene: Build) -> None:
    many = scene(10, classes=4)
    lying = SearchNetwork(lambda x: -many.model(x))
    still = [Square(name="square", eps=1e-9, norm="linf", queries=3)]
    assert (ensemble_on(many, still, network=lying).run().broken_by == UNBROKEN).all()


def test_a_search_without_numbers_still_asks_the_exact_model(scene: Build) -> None:
    """A network that overflows tells nothing: every point is a suspect."""
    many = scene(10, classes=4, seed=7)
    blind = SearchNetwork(lambda x: many.model(x) * torch.nan)
    result = ensemble_on(many, [Square(name="square", eps=0.3, norm="linf", queries=3)], network=blind).run()
    assert result.not_finite == 0
    assert len(result.points) > 0


def test_logits_that_are_no_numbers_break_an_image_and_are_counted(grey: Any) -> None:
    network = grey.model

    class Gap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            dark = x.mean((1, 2, 3)) < 0.25
            return torch.where(dark[:, None], torch.nan, network(x))

    usual = ensemble_on(grey, searches("linf", 0.03)).run()
    result = ensemble_on(replace(grey, model=Gap()), searches("linf", 0.03)).run()
    assert set(result.points) == set(usual.points) | {0, 1}
    assert result.broken_by[:2].tolist() == [0, 0]
    assert torch.equal(result.prediction[:2], (grey.y[:2] + 1) % 4)
    assert result.not_finite == 2
    assert usual.not_finite == 0


def test_progress_rises_from_nothing_to_all(scene: Build) -> None:
    many = scene(12, seed=8)
    ensemble = ensemble_on(many, searches("linf"), batch_size=5)
    assert ensemble.progress() == 0
    assert ensemble.ran() == [0, 0, 0, 0]
    progress, shares = [0.0], [[0.0] * 4]

    def note(running: Ensemble) -> bool:
        progress.append(running.progress())
        shares.append(running.ran())
        return True

    ensemble.run(note)
    assert ensemble.progress() == pytest.approx(1)
    assert ensemble.ran() == [1, 1, 1, 1]
    assert all(before <= after + 1e-12 for before, after in pairwise(progress))
    for before, after in pairwise(shares):
        assert all(0 <= b <= a + 1e-12 <= 1 + 1e-12 for b, a in zip(before, after, strict=True))
    assert len(set(progress)) > 20


def test_standing_examples_only_become_fewer(scene: Build) -> None:
    many = scene(16, seed=9)
    left = [16]
    ensemble = ensemble_on(many, searches("linf"))
    result = ensemble.run(lambda running: left.append(int((running.result.broken_by == UNBROKEN).sum())) is None)
    assert all(before >= after for before, after in pairwise(left))
    assert left[-1] == 16 - len(result.points)
    first = ensemble_on(many, searches("linf")[:1]).run()
    assert set(first.points) <= set(result.points)


def test_a_classifier_of_one_answer_is_never_broken(scene: Build) -> None:
    few = scene(5, classes=4)
    few.y = torch.full_like(few.y, 2)
    few.model.head.weight.zero_()
    few.model.head.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    for norm in ("linf", "l2"):
        assert (ensemble_on(few, searches(norm, 1.0)).run().broken_by == UNBROKEN).all()


def test_without_examples_it_ends_at_once(scene: Build) -> None:
    few = scene(3)
    ensemble = ensemble_on(replace(few, x=few.x[:0], y=few.y[:0]), searches("linf"))
    assert ensemble.run().points == {}
    assert ensemble.finished


def test_a_model_of_the_wrong_shape_is_an_error(scene: Build) -> None:
    few = scene(3)
    ensemble = ensemble_on(
        replace(few, model=lambda x: few.model(x).amax(1)), searches("linf"), network=SearchNetwork(few.model)
    )
    with pytest.raises(ModelError, match="logits"):
        ensemble.run()


def test_only_fab_sees_the_distance_network(scene: Build) -> None:
    class Counted(SearchNetwork):
        calls = 0

        def gradient(self, *given: Any) -> tuple[Tensor, Tensor]:
            self.calls += 1
            return super().gradient(*given)

    held = scene(8, seed=2)
    plain, distance = Counted(held.model), Counted(held.model)
    for attack, used in ((searches("linf")[0], plain), (searches("linf")[2], distance)):
        before = plain.calls + distance.calls
        ensemble = ensemble_on(held, [attack], batch_size=8, network=plain)
        ensemble.distance_network = distance
        ensemble.run()
        assert used.calls == plain.calls + distance.calls - before > 0
