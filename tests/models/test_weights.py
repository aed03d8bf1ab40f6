from __future__ import annotations

import argparse
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reference.public_networks import (
    PublicDMWideResNet,
    PublicPreActResNet18,
    PublicResNet18,
    PublicWideResNet,
    scramble,
)
from robustfair.errors import CheckpointError, ModelError, UnknownNameError
from robustfair.models import Normalised, create_model, load_weights, read_weight_file


@pytest.fixture
def model():
    return create_model("small-cnn", width=4)


def _other(model):
    """Weights of a second network of the same shape."""
    torch.manual_seed(1)
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def _prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def _assert_same_logits(ours, public):
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = public.double()(x)
        torch.testing.assert_close(
            ours.eval().double()(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())
        )


def _same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_public_wide_resnet_gives_the_same_logits_and_names_the_dead_copy():
    public = scramble(PublicWideResNet(16, 2, num_classes=7), seed=1)
    ours = create_model("wrn-16-2", num_classes=7, normalise="none")
    report = load_weights(ours, public.state_dict())
    _assert_same_logits(ours, public)
    assert report.naming == "public"
    assert report.unused == tuple(name for name in public.state_dict() if name.startswith("sub_block1."))
    assert report.missing == ("normalise.mean", "normalise.std")
    assert "sub_block1.layer.0.bn1.weight" in str(report)


def test_public_wide_resnet_without_the_dead_copy():
    public = scramble(PublicWideResNet(10, 1, dead_copy=False), seed=2)
    report = load_weights(create_model("wrn-10-1"), public.state_dict())
    assert report.unused == ()


def test_public_preact_resnet_gives_the_same_logits():
    public = scramble(PublicPreActResNet18(width=8), seed=3)
    ours = create_model("preact-resnet18", width=8, normalise="none")
    report = load_weights(ours, {"net": _prefixed(public.state_dict(), "module."), "epoch": 3})
    _assert_same_logits(ours, public)
    assert (report.branch, report.prefix, report.naming) == ("net", "module.", "public")


@pytest.mark.parametrize(("shortcut", "head"), [("shortcut", "linear"), ("downsample", "fc")])
def test_public_resnet_in_either_naming_gives_the_same_logits(shortcut, head):
    public = scramble(PublicResNet18(width=8, shortcut=shortcut, head=head), seed=5)
    ours = create_model("resnet18", width=8, normalise="none")
    report = load_weights(ours, {"state_dict": _prefixed(public.state_dict(), "module.model.")})
    _assert_same_logits(ours, public)
    assert (report.branch, report.prefix, report.naming) == ("state_dict", "module.model.", "public")
    assert report.unused == ()


@pytest.mark.parametrize("classes", [10, 100])
def test_public_dm_wide_resnet_gives_the_same_logits_behind_its_own_statistics(classes):
    hundred = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)} if classes == 100 else {}
    public = scramble(PublicDMWideResNet(16, 2, classes, **hundred), seed=6)
    ours = create_model("dm-wrn-16-2", num_classes=classes)
    report = load_weights(ours, {"model_state_dict": public.state_dict(), "epoch": 800})
    torch.testing.assert_close(ours.normalise.mean, public.mean.flatten(), rtol=0, atol=0)
    _assert_same_logits(ours, public)
    assert (report.branch, report.naming, report.unused) == ("model_state_dict", "public", ())
    assert report.missing == ("normalise.mean", "normalise.std")


def test_the_two_wide_resnets_are_not_taken_for_each_other():
    dm, plain = PublicDMWideResNet(10, 1).state_dict(), PublicWideResNet(10, 1, dead_copy=False).state_dict()
    with pytest.raises(ModelError, match=r"those of a dm-wrn-10-1, which is another function than wrn-10-1"):
        load_weights(create_model("wrn-10-1"), _prefixed(dm, "module."))
    with pytest.raises(ModelError, match=r"build wrn-10-1$"):
        load_weights(create_model("dm-wrn-10-1"), plain)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("resnet18", "preact-resnet18"),
        ("preact-resnet18", "resnet18"),
        ("wrn-10-1", "resnet18"),
        ("wrn-10-1", "resnet9"),
    ],
)
def test_weights_of_another_architecture_are_refused(first, second):
    weights = create_model(first, width=1).state_dict()
    model = create_model(second, width=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"do not fit|other shapes"):
        load_weights(model, weights)
    assert _same(model, before)


@pytest.mark.parametrize(
    ("statistics", "prefix"),
    [
        ((), ""),
        ((), "module.model."),
        (("0.mean", "0.std"), "1."),
        (("mu", "sigma"), ""),
        (("module.normalizer.new_mean", "module.normalizer.new_std"), "module.model."),
    ],
)
def test_a_network_behind_a_normalisation_takes_the_keys_of_the_bare_one(statistics, prefix):
    public = scramble(PublicResNet18(width=4), seed=7)
    state = _prefixed(public.state_dict(), prefix)
    state |= {key: torch.full((1, 3, 1, 1), value) for key, value in zip(statistics, (0.25, 0.75), strict=False)}
    model = Normalised(PublicResNet18(width=4), 3, None, None)
    before = model.normalise.statistics()
    report = load_weights(model, state)
    assert _same(model.network, public.state_dict())
    assert model.normalise.statistics() == (((0.25,) * 3, (0.75,) * 3) if statistics else before)
    assert (report.prefix, report.added, report.naming) == (prefix, "network.", "own")
    assert report.missing == (() if statistics else ("normalise.mean", "normalise.std"))


def test_the_copy_inside_an_attacker_is_left_aside():
    public = scramble(PublicResNet18(width=4), seed=8)
    state = _prefixed(public.state_dict(), "module.model.") | _prefixed(public.state_dict(), "module.attacker.model.")
    state["module.attacker.normalize.new_mean"] = torch.zeros(3)
    model = Normalised(PublicResNet18(width=4), 3, None, None)
    report = load_weights(model, {"model": state})
    assert _same(model.network, public.state_dict())
    assert report.unused == tuple(key for key in state if "attacker" in key)


def test_a_sequential_of_statistics_and_network_takes_bare_weights_and_keeps_its_own():
    public = scramble(PublicResNet18(width=4), seed=9)
    layer = nn.Module()
    layer.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
    layer.register_buffer("std", torch.full((1, 3, 1, 1), 0.2))
    model = nn.Sequential(layer, PublicResNet18(width=4))
    report = load_weights(model, public.state_dict())
    assert _same(model[1], public.state_dict())
    assert (report.added, report.missing) == ("1.", ("0.mean", "0.std"))
    assert "prefix '1.' added; kept from the model: 0.mean, 0.std" in str(report)


def test_statistics_without_a_place_are_not_dropped():
    state = {"0.mean": torch.zeros(3), "0.std": torch.ones(3), **_prefixed(PublicResNet18(width=4).state_dict(), "1.")}
    with pytest.raises(ModelError, match=r"bring input statistics \(0.mean, 0.std\), and PublicResNet18 has no place"):
        load_weights(PublicResNet18(width=4), state)


@pytest.mark.parametrize(
    "keys",
    [
        ("0.mean", "0.std", "1."),
        ("normalize.mean", "normalize.std", "model."),
        ("mu", "sigma", ""),
        ("normalization.mu", "normalization.sigma", ""),
    ],
)
def test_statistics_in_a_public_file_set_ours(keys):
    mean, std, prefix = keys
    public = scramble(PublicPreActResNet18(width=4), seed=4)
    statistics = {
        mean: torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1),
        std: torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1),
    }
    ours = create_model("preact-resnet18", width=4)
    report = load_weights(ours, {**statistics, **_prefixed(public.state_dict(), prefix)})
    assert ours.normalise.statistics() == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert report.missing == ()


@pytest.mark.parametrize("branch", ["state_dict", "net", "model", "model_state_dict", "ema_state_dict", "anything"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."]
)
def test_branches_and_prefixes(model, branch, prefix):
    state = _other(model)
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    report = load_weights(model, {branch: _prefixed(state, prefix), "optimizer": optimizer, "best": torch.tensor(0.5)})
    assert _same(model, state)
    assert (report.branch, report.prefix, report.naming, report.unused) == (branch, prefix, "own", ())


def test_nested_twice_with_other_branches(model):
    state = _other(model)
    report = load_weights(model, {"model": {"state_dict": state}, "ema_state_dict": {"x": torch.zeros(1)}})
    assert report.branch == "model.state_dict"
    assert report.other_branches == ("ema_state_dict",)
    assert str(report) == "weights from 'model.state_dict'; not taken: 'ema_state_dict' (`select_weights` chooses)"
    assert _same(model, state)


def test_wrapped_target(model):
    state = _other(model)
    load_weights(nn.DataParallel(torch.compile(model)), state)
    assert _same(model, state)


def test_foreign_target_keeps_its_own_names():
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)
            self.fc = nn.Linear(2, 2)

    foreign = Foreign()
    state = _other(foreign)
    report = load_weights(foreign, state)
    assert (report.prefix, report.naming) == ("", "own")
    assert _same(foreign, state)


def test_plain_entries_are_named(model):
    report = load_weights(model, {**model.state_dict(), "epoch": 3})
    assert report.unused == ("epoch",)
    assert str(report) == "weights from the top level; unused keys: epoch"


def test_batch_counters_may_be_absent():
    model = create_model("wrn-10-1")
    state = {name: value for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    report = load_weights(model, state)
    assert all("num_batches_tracked" in name for name in report.missing)


def test_strict_names_up_to_five_keys_and_changes_nothing(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {**_other(model), **{f"extra{i}": torch.zeros(1) for i in range(7)}}
    del state["conv2.weight"]
    expected = r"lack conv2.weight and hold the unknown extra0, extra1, extra2, extra3, extra4 and 2 more"
    with pytest.raises(ModelError, match=expected):
        load_weights(model, state)
    assert _same(model, before)
    report = load_weights(model, state, strict=False)
    assert report.missing == ("conv2.weight",)
    assert len(report.unused) == 7


def test_two_keys_for_one_name_are_not_taken_in_silence(model):
    state = _other(model)
    with pytest.raises(ModelError, match="unknown"):
        load_weights(model, {**state, **_prefixed({"head.bias": state["head.bias"]}, "module.")})


def test_wrong_number_of_classes_is_said_plainly_of_any_head():
    with pytest.raises(ModelError, match=r"weights have 7 outputs, the model has 10"):
        load_weights(PublicResNet18(width=4), PublicResNet18(7, width=4).state_dict())


def test_wrong_number_of_classes_is_said_plainly():
    weights = create_model("small-cnn", num_classes=100, width=4).state_dict()
    with pytest.raises(
        ModelError,
        match=r"weights have 100 outputs, the model has 10, .*\. Choose data of 100 classes, or weights for 10",
    ):
        load_weights(create_model("small-cnn", width=4), weights)


@pytest.mark.parametrize("strict", [True, False])
def test_wrong_width_is_refused_and_changes_nothing(model, strict):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"conv1.weight \(8, 3, 3, 3\) for \(4, 3, 3, 3\)"):
        load_weights(model, create_model("small-cnn", width=8).state_dict(), strict=strict)
    assert _same(model, before)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "holds no weights"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "holds no weights; its keys are epoch, args"),
        ({"a": {"w": torch.zeros(1)}, "b": {"w": torch.zeros(1)}}, "several sets of weights, a, b"),
        ({"other.weight": torch.zeros(1)}, "no key fits SmallCNN"),
    ],
)
def test_checkpoints_without_our_weights(model, checkpoint, message):
    with pytest.raises(ModelError, match=message):
        load_weights(model, checkpoint, strict=False)


def test_files_are_read_back(tmp_path, model):
    state = model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "w.pth.tar")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "w.pth.tar", "legacy.pt"):
        other = create_model("small-cnn", width=4)
        load_weights(other, read_weight_file(tmp_path / name))
        assert _same(other, state)


class Spy:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a weight file was run')",))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin"])
@pytest.mark.parametrize("legacy", [True, False])
def test_files_that_need_code_are_refused(tmp_path, model, name, legacy):
    for content, named in (
        (Spy(), "exec"),
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (nn.Linear(1, 1), "nn"),
    ):
        torch.save({"state_dict": content}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(
            CheckpointError, match=f"holds the Python object .*{named}.*can run code is never read"
        ) as caught:
            read_weight_file(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_plain_pickles_are_refused(tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(Spy()))
    with pytest.raises(CheckpointError):
        read_weight_file(tmp_path / "w.pkl")


@pytest.mark.parametrize("name", ["w.pt", "legacy.pt", "w.safetensors"])
def test_cut_empty_and_foreign_files(tmp_path, model, name):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=name == "w.pt")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1] if name != "w.pt" else whole[:100], b"", b"not weights\n" * 9):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cut, corrupt or not a weight file") as caught:
            read_weight_file(path)
        assert "\n" not in str(caught.value)


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_weight_file(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_weight_file(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_weight_file(tmp_path / "list.pt")


NETWORK_PREFIXES = ["model.", "student.", "model.module.", "trainer.net._orig_mod.", "a.b.c."]


@pytest.mark.parametrize("prefix", NETWORK_PREFIXES)
@pytest.mark.parametrize("branch", ["state_dict", "whatever"])
def test_keys_beside_the_network_are_left_out_and_said(model, prefix, branch):
    state = _other(model)
    beside = {"criterion.weight": torch.ones(10), "val_acc.tp": torch.zeros(10), "loss.scale": torch.tensor(2.0)}
    report = load_weights(model, {branch: {**beside, **_prefixed(state, prefix)}, "epoch": 3})
    assert _same(model, state)
    assert (report.branch, report.prefix, report.unused) == (branch, prefix, tuple(beside))
    assert f"prefix {prefix!r} removed; unused keys: criterion.weight, val_acc.tp, loss.scale" in str(report)


def test_public_names_under_a_prefix_of_any_kind_are_read_too():
    public = scramble(PublicPreActResNet18(width=4), seed=4)
    ours = create_model("preact-resnet18", width=4, normalise="none")
    report = load_weights(ours, _prefixed(public.state_dict(), "classifier_net.") | {"ce.weight": torch.ones(10)})
    _assert_same_logits(ours, public)
    assert (report.prefix, report.naming, report.unused) == ("classifier_net.", "public", ("ce.weight",))


@pytest.mark.parametrize("prefix", ["", *NETWORK_PREFIXES])
def test_keys_of_the_network_itself_are_never_left_out(model, prefix):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = _prefixed(_other(model), prefix)
    with pytest.raises(ModelError, match=rf"hold the unknown {prefix}fc2.weight\. Build .* or save the file without"):
        load_weights(model, {**state, f"{prefix}fc2.weight": torch.zeros(3)})
    del state[f"{prefix}conv2.weight"]
    with pytest.raises(ModelError, match=r"they lack conv2.weight\. Build the architecture they were saved from$"):
        load_weights(model, state)
    assert _same(model, before)


def test_other_parts_of_a_sequential_are_not_left_out(model):
    state = _prefixed(_other(model), "1.")
    for beside in ("0.weight", "2.scale"):
        with pytest.raises(ModelError, match=f"hold the unknown {beside}"):
            load_weights(model, {**state, beside: torch.ones(1)})
    load_weights(model, {**state, "ema_decay.value": torch.ones(1)})


def _sets(model, *names):
    return {name: {key: value + place for key, value in _other(model).items()} for place, name in enumerate(names)}


def _nested(sets):
    """Sets of weights by dotted names, as nested dicts."""
    found = {}
    for name, state in sets.items():
        *path, last = name.split(".")
        inner = found
        for word in path:
            inner = inner.setdefault(word, {})
        inner[last] = state
    return found


@pytest.mark.parametrize("names", [("best", "last"), ("runs.one", "runs.two", "runs.three"), ("state_dict.a", "b")])
@pytest.mark.parametrize("flat", [False, True])
def test_several_sets_are_listed_and_one_can_be_chosen(model, names, flat):
    sets = _sets(model, *names)
    content = _nested(sets)
    if flat:
        content = {f"{name}.{key}": value for name, state in sets.items() for key, value in state.items()}
    with pytest.raises(ModelError, match=f"several sets of weights, {', '.join(names)}. Name .* with `select_weights`"):
        load_weights(model, content)
    for name, state in sets.items():
        for word in (name, name.split(".")[-1]):
            report = load_weights(model, content, select_weights=word)
            assert _same(model, state)
            assert report.other_branches == tuple(other for other in names if other != name)
    with pytest.raises(UnknownNameError, match=f"unknown set of weights 'zzzz': known: {', '.join(sorted(names))}"):
        load_weights(model, content, select_weights="zzzz")


@pytest.mark.parametrize(
    ("taken", "other"),
    [("model", "model_ema"), ("state_dict", "ema_state_dict"), ("net", "ema"), ("state_dict", "best_state_dict")],
)
def test_raw_weights_come_before_averaged_ones_which_can_be_chosen(model, taken, other):
    sets = _sets(model, taken, other)
    report = load_weights(model, dict(reversed(sets.items())))
    assert _same(model, sets[taken])
    assert f"not taken: {other!r} (`select_weights` chooses)" in str(report)
    report = load_weights(model, sets, select_weights=other)
    assert _same(model, sets[other])
    assert (report.branch, report.other_branches) == (other, (taken,))


def test_averaged_weights_beside_the_raw_ones_in_one_state_dict(model):
    raw, averaged = _sets(model, "model", "model_ema.module").values()
    content = {"state_dict": _prefixed(raw, "model.") | _prefixed(averaged, "model_ema.module.")}
    report = load_weights(model, content)
    assert _same(model, raw)
    assert report.other_branches == ("state_dict.model_ema",)
    load_weights(model, content, select_weights="model_ema")
    assert _same(model, averaged)
    report = load_weights(model, raw | _prefixed(averaged, "ema."))
    assert _same(model, raw)
    assert report.other_branches == ("ema",)
    load_weights(model, raw | _prefixed(averaged, "ema."), select_weights="ema")
    assert _same(model, averaged)


def test_what_fits_decides_among_networks_of_one_file(model):
    state = _other(model)
    wider = create_model("small-cnn", width=8).state_dict()
    report = load_weights(model, {"teacher": wider, "student": state, "loss": {"w": torch.ones(1)}})
    assert _same(model, state)
    assert (report.branch, report.other_branches) == ("student", ("teacher",))
    load_weights(model, _prefixed(wider, "teacher.") | _prefixed(state, "student."))
    assert _same(model, state)
    with pytest.raises(ModelError, match=r"conv1.weight \(8, 3, 3, 3\) for \(4, 3, 3, 3\)"):
        load_weights(model, {"teacher": wider, "student": state}, select_weights="teacher")


def test_members_of_an_ensemble_are_several_sets(model):
    sets = _sets(model, "models.0", "models.1")
    content = {f"{name}.{key}": value for name, state in sets.items() for key, value in state.items()}
    with pytest.raises(ModelError, match=r"several sets of weights, models.0, models.1"):
        load_weights(model, content)
    load_weights(model, content, select_weights="models.1")
    assert _same(model, sets["models.1"])


def test_objects_that_were_not_read_are_said(tmp_path, model):
    torch.save({"net": model.state_dict(), "args": argparse.Namespace(lr=1), "acc": np.float64(1)}, tmp_path / "w")
    report = load_weights(model, read_weight_file(tmp_path / "w"))
    assert report.not_read[0] == "args (argparse.Namespace)"
    assert "Python objects not read: args (argparse.Namespace), acc (numpy." in str(report)
