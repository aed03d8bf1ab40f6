"""`robustfair audit` as a user meets it: which images and threat, what it prints and leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from reference.commands import AUDIT, TEN, WEIGHTS, Command, training
from reference.layouts import pixels, write_images
from reference.runs import changes, tree
from robustfair.data import load_dataset


def test_an_audit_is_printed_as_the_json_it_stores(place: Path, command: Command) -> None:
    outcome = command("audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 3, "--json")
    printed = outcome.json()
    (stored,) = (place / "run" / "audit").glob("*.json")
    assert printed == json.loads(stored.read_text())
    assert printed["schema"] == "robustfair.audit/2"
    assert list(printed["attacks"]) == ["clean", "pgd-2"]
    arrays = np.load(stored.with_suffix(".npz"))
    assert set(arrays.files) == {"index", "labels", "clean", "pgd-2"}
    for attack, found in printed["attacks"].items():
        confusion = np.zeros((10, 10), dtype=int)
        np.add.at(confusion, (arrays[attack], arrays["labels"]), 1)
        counts = found["confusion"]
        assert counts["count"] == confusion[counts["predicted"], counts["true"]].tolist()
        assert sum(counts["count"]) == confusion.sum()
        assert found["correct"] == confusion.diagonal().tolist()


def test_an_audit_takes_data_and_threat_from_the_run(place: Path, command: Command) -> None:
    found = command("audit", "run", "--attacks", "clean,pgd-2", "--json").json()
    test = load_dataset("digits").test
    assert found["data"] | {"split": ""} == {
        "name": "digits",
        "fingerprint": test.fingerprint,
        "images": len(test),
        "split": "",
    }
    assert found["threat"] == {"norm": "linf", "eps": 0.1, "step_size": 0.025}
    assert found["attacks"]["pgd-2"]["settings"]["eps"] == 0.1


def test_an_audit_takes_norm_and_image_size_from_the_run(place: Path, command: Command) -> None:
    assert command(*training(norm="l2", eps="0.5", image_size=10, epochs=1)).code == 0
    found = command("audit", "new", "--attacks", "clean,fgsm", "--json").json()
    assert (found["threat"]["norm"], found["threat"]["eps"]) == ("l2", 0.5)
    assert found["data"]["fingerprint"] == load_dataset("digits", image_size=10).test.fingerprint


def test_flags_of_an_audit_go_before_what_the_run_says(place: Path, command: Command) -> None:
    words = ["--eps", "8/255", "--step-size", "1/255", "--data", "good.npz", "--seed", 5]
    found = command("audit", "run", "--attacks", "clean,pgd-2", *words, "--json").json()
    assert found["threat"] == {"norm": "linf", "eps": 8 / 255, "step_size": 1 / 255}
    assert found["data"]["images"] == 20
    assert found["provenance"]["seed"] == 5


def test_another_norm_does_not_take_the_radius_of_the_run(place: Path, command: Command) -> None:
    found = command("audit", "run", "--norm", "l2", *AUDIT, "--json").json()
    assert (found["threat"]["norm"], found["threat"]["eps"]) == ("l2", 128 / 255)


def test_training_images_are_not_recorded_as_test_images(place: Path, command: Command) -> None:
    assert command(*training(data="good.npz", limit_per_class=None, epochs=1)).code == 0
    assert command("audit", "new", "--attacks", "clean", "--json").json()["data"]["split"] == "train"


def test_an_audit_says_what_was_left_out_and_counts_its_images(place: Path, command: Command) -> None:
    for part in ("train", "val"):
        write_images(Path("pictures", part), {"car": pixels(1, channels=1), "dog": pixels(1, channels=1, seed=1)})
    Path("pictures/logs").mkdir()
    assert command(*training(data="pictures", limit_per_class=None, epochs=1, validation=0, select="last")).code == 0
    outcome = command("audit", "new", "--attacks", "clean", "--json")
    assert outcome.code == 0
    assert outcome.json()["data"]["split"] == "test"
    lines = outcome.err.splitlines()
    assert "warning: pictures: left out: logs/ (no image in it)" in lines
    assert "warning: pictures: the validation part is the test part" in lines
    assert "pictures, test part: 2 images of 2 classes (1 each)" in lines


def test_images_that_changed_since_the_run_are_refused(place: Path, command: Command) -> None:
    assert command(*training(data="good.npz", limit_per_class=None, epochs=1)).code == 0
    np.savez(place / "good.npz", images=pixels(20, channels=1, seed=1), labels=np.arange(20) % 10)
    before = tree(place)
    for argv in (["audit", "new", *AUDIT], ["train", "--out", "new", "--resume"]):
        outcome = command(*argv)
        assert outcome.code == 2, argv[0]
        assert "changed" in outcome.err
    assert changes(before, tree(place)) == []


def test_a_weight_file_audits_as_the_run_it_came_from(place: Path, command: Command) -> None:
    words = ["--attacks", "clean,pgd-2", "--limit-per-class", 9, "--json"]
    of_run = command("audit", "run", "--checkpoint", "last", *words).json()
    file = "run/checkpoints/last/weights.safetensors"
    given = ["--data", "digits", "--eps", "0.1", *words]
    of_file = command("audit", file, "--arch", "small-cnn", "--width", 4, *given).json()
    of_factory = command("audit", "zoo_of_test:tiny", "--weights", file, *given).json()
    for other in (of_file, of_factory):
        for key in ("attacks", "robust", "threat", "data", "class_names", "head_norms", "count"):
            assert other[key] == of_run[key]
    assert len(set(of_run["attacks"]["clean"]["confusion"]["predicted"])) > 2
    assert (of_file["model"], of_factory["model"]) == (file, f"zoo_of_test:tiny ({file})")


def test_a_pt_file_without_code_is_read(place: Path, command: Command) -> None:
    safetensors, pt = (command("audit", name, *WEIGHTS, "--json").json() for name in ("good.safetensors", "good.pt"))
    assert pt["count"] == safetensors["count"]
    assert torch.load("good.pt", weights_only=True).keys() == load_file("good.safetensors").keys()


def test_keys_beside_the_network_and_further_sets_are_said_and_can_be_chosen(place: Path, command: Command) -> None:
    raw = command("audit", "beside.pth.tar", *WEIGHTS, "--json", "--out", "raw")
    assert raw.code == 0
    assert (
        "note: weights from 'state_dict'; not taken: 'ema_state_dict' (--select-weights chooses); prefix 'model.' "
        "removed; unused keys: criterion.weight; Python objects not read: args (argparse.Namespace)\n"
    ) in raw.err
    averaged = command("audit", "beside.pth.tar", "--select-weights", "ema", *WEIGHTS, "--json", "--out", "raw")
    assert "note: weights from 'ema_state_dict'; not taken: 'state_dict.model'" in averaged.err
    assert averaged.json()["model"] == "beside.pth.tar (ema)"
    assert len(list((place / "raw").glob("*.json"))) == 2
    few = ("--which", "fog", "--severities", "1", "--limit-per-class", "1")
    assert command("corruptions", "two.ckpt", "--select-weights", "best", *WEIGHTS[:-4], *few).code == 0


def test_a_model_from_elsewhere_leaves_files_only_where_it_is_told(place: Path, command: Command) -> None:
    before = tree(place)
    assert command("audit", "good.safetensors", *WEIGHTS).code == 0
    assert changes(before, tree(place)) == []
    assert (
        command("audit", "good.safetensors", *WEIGHTS, "--out", "deep/audits", "--report", "deep/page.html").code == 0
    )
    written = changes(before, tree(place))
    assert {Path(path).suffix for path in written} == {"", ".json", ".npz", ".html"}
    assert all(path.startswith("deep") for path in written)


def test_checkpoints_are_audited_by_name(place: Path, command: Command) -> None:
    found = {
        name: command("audit", "run", "--checkpoint", name, "--attacks", "clean", "--json").json()
        for name in ("best", "last", "ema")
    }
    assert found["last"]["attacks"] != found["ema"]["attacks"]
    selected = json.loads((place / "run" / "manifest.json").read_text())["selected"]
    assert found["best"]["model"] == f"run (best: {selected['candidate']}, epoch {selected['epoch']})"
    assert found["last"]["model"] == "run (last: model, epoch 2)"
    assert found["ema"]["model"] == "run (ema: ema, epoch 2)"
    plain = command("audit", "run", "--attacks", "clean", "--json").json()
    assert plain["attacks"] == found["best"]["attacks"]


def test_the_same_audit_replaces_itself_and_no_other(place: Path, command: Command) -> None:
    def files() -> set[str]:
        return {path.name for path in (place / "run" / "audit").glob("*.json")}

    first = ["audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 2]
    assert command(*first).code == 0
    seen = files()
    assert command(*first).code == 0
    assert files() == seen
    for other in (
        ["--data", "good.npz"],
        ["--checkpoint", "last"],
        ["--seed", 1],
        ["--eps", "0.2"],
        ["--norm", "l2"],
        ["--alpha", "0.05"],
        ["--precision", "bf16"],
    ):
        assert command(*first, *other).code == 0
        assert len(files()) == len(seen) + 1, other
        seen = files()


def test_two_models_may_share_a_folder_of_audits(place: Path, command: Command) -> None:
    for name in ("good.safetensors", "run/checkpoints/last/weights.safetensors"):
        assert command("audit", name, *WEIGHTS, "--out", "audits").code == 0
    assert len(list((place / "audits").glob("*.json"))) == 2


def test_an_audit_beside_a_baseline_shows_both(place: Path, command: Command) -> None:
    outcome = command(
        *("audit", "repaired", "--attacks", "clean", "--limit-per-class", 2),
        *("--baseline", "baseline.json", "--report", "page.html"),
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    for part in ("before", "after"):
        assert any(line.startswith(f"{part}  ") and "clean" in line and "average" in line for line in lines)
    for name in TEN:
        assert sum(line.split()[:2] == [name, "2"] for line in lines) == 1
    assert "before" in (place / "page.html").read_text(encoding="utf-8").lower()


def test_an_audit_prints_a_line_per_class_and_what_it_wrote(place: Path, command: Command) -> None:
    outcome = command("audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 3)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    for name in TEN:
        assert sum(line.split()[:2] == [name, "3"] for line in lines) == 1
    wrote = [Path(line.removeprefix("wrote ")) for line in lines if line.startswith("wrote ")]
    assert [path.suffix for path in wrote] == [".json", ".npz", ".html"]
    assert all(path.is_file() for path in wrote)
