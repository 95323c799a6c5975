"""What ``dedistill plan`` says of a recipe, and that it refuses what a start refuses, in the same words."""

import json
import re

import pytest
from tiny_recipes import TEACHER

from dedistill.cli.main import main


@pytest.fixture
def planned(capsys):
    """The exit code, what is printed as data, and what is said beside it."""

    def run(*words: str) -> tuple[int, dict, str]:
        code = main(["plan", *map(str, words), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return run


def test_numbers_of_a_run(planned, image_recipe):
    code, facts, said = planned(image_recipe, "--set", "snapshot.every=1")
    assert (code, facts["refused"]) == (0, []), said
    # twelve images, of which the hash holds some out; 2 steps of 4
    assert facts["images"] == 12 and 1 <= facts["held_out"] <= 3
    assert facts["epochs"] == round(2 * 4 / (12 - facts["held_out"]), 2)
    assert (facts["steps"], facts["samples"], facts["snapshots"]) == (2, 8, 2)
    numbers = facts["trained_parameters"]
    assert facts["disk_gb"]["snapshots"] == round(2 * 4 * numbers / 1e9, 2)
    memory = facts["memory"]
    assert memory["peak_gib"] == pytest.approx(sum(memory["by_category_gib"].values()), abs=1e-3)
    assert 0 < memory["peak_gib"] <= memory["reserved_gib"]
    # the tiny pipeline's own encoders, by their config.json: of published size they would take 10 GiB
    assert set(memory["other_gib"]) == {"encoding captions", "encoding images"}
    assert all(0 < size < 0.5 for size in memory["other_gib"].values())
    assert {c["fit"] for c in facts["cards"]} == {"fits"} and all(c["seconds"] > 0 for c in facts["cards"])
    assert {o["micro_batch"] for o in facts["other_settings"]} == {1, 2, 4}


def test_the_step_of_a_plan_has_the_work_of_all_its_micro_batches(planned, teacher_recipe):
    """Of the network; its optimizer steps once, and gradients are added up, a kernel for each parameter."""
    whole = planned(teacher_recipe, "--set", "train.batch=8")[1]["step"]
    parted = planned(teacher_recipe, "--set", "train.batch=8", "--set", "train.micro_batch=2")[1]["step"]
    assert parted["tflop"] == pytest.approx(whole["tflop"], rel=1e-3)
    assert 4 * whole["kernels"] < parted["kernels"] < 5 * whole["kernels"]


def test_a_card_is_shown_what_fits_it(capsys, teacher_recipe):
    assert main(["plan", str(teacher_recipe), "--card", "24"]) == 0
    rows = [line for line in capsys.readouterr().out.partition("of 24 GB")[2].splitlines() if "micro-batch" in line]
    seconds = [float(re.search(r"RTX 3090 (\S+) s", row)[1]) for row in rows]
    assert len(rows) >= 4 and seconds == sorted(seconds)
    assert main(["plan", str(teacher_recipe), "--card", "0.61"]) == 0
    assert "nothing fits 0.61 GB" in capsys.readouterr().out


@pytest.mark.slow
def test_what_a_recipe_leaves_open_is_shown_for_a_card(planned, adapter_recipe):
    """One that has room for nothing, and those of the table, which have room for all."""
    auto = [word for key in ("base.swap=auto", "train.gradient_checkpointing=auto") for word in ("--set", key)]
    facts = planned(adapter_recipe, *auto, "--set", "train.batch=2", "--card", "0.6")[1]
    assert facts["auto"]["train.gradient_checkpointing"] is True and facts["fitting"] == []
    assert {(c["swap"], c["gradient_checkpointing"]) for c in facts["cards"]} == {(0, False)}


@pytest.mark.slow
def test_each_of_several_gpus(planned, capsys, adapter_recipe):
    """Those that train the recipe in categories, the others with the reason that a start gives; of ZeRO-3 nothing is known."""
    code, facts, _ = planned(adapter_recipe, "--gpus", "4", "--set", "train.batch=4")
    rows = {row["engine"]: row for row in facts["each_of_gpus"]}
    assert code == 0 and rows.keys() == {"ddp", "fsdp2", "zero2", "zero3"}
    for row in (r for r in rows.values() if not {"refused", "unknown"} & r.keys()):
        assert row["peak_gib"] == pytest.approx(sum(row["by_category_gib"].values()), abs=1e-5) and row["cards"]["24"] == "fits"
    assert rows["fsdp2"]["by_category_gib"]["base"] < rows["ddp"]["by_category_gib"]["base"] / 3.9
    whole = planned(adapter_recipe, "--gpus", "2", "--set", "base.quant=int8-quanto", "--set", "train.batch=2")[1][
        "each_of_gpus"
    ]
    assert [row["engine"] for row in whole if "refused" in row] == ["fsdp2", "zero3"]
    assert rows["zero3"]["unknown"].startswith("not forecast")
    for wrong in ("1", "-3", "two", "2.5"):
        with pytest.raises(SystemExit):
            main(["plan", str(adapter_recipe), "--gpus", wrong])


WRONG = {
    "a layer that is not there": ["adapter.targets=[{pattern='nothing.here'}]"],
    "a rank above the layer's": ["adapter.targets=[{preset='attention', rank=400}]"],
    "captions that are too long": ["model.text_length=600"],
    "images of a size that it cannot have": ["model.family=pixel_flux"],
    "more blocks than there are": ["train.gradient_checkpointing=50"],
    "an excluded linear that is not there": ["base.quant=int8", "base.exclude=['nope.*']"],
    "images below every bucket": ["data.resolutions=[4096]"],
    "images that are not there": ["data.sets=[{path='nowhere'}]"],
    "a model that is not there": ["model.path=models/nowhere"],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_start_refuses_a_plan_refuses(wrong, image_recipe, planned, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [word for setting in WRONG[wrong] for word in ("--set", setting)]
    assert main(["train", str(image_recipe), *words]) in (1, 2)
    refusal = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")).removeprefix("error: ")
    code, facts, said = planned(image_recipe, *words, "--no-forecast")
    assert code == 2 and any(refusal in message for message in facts["refused"]), (refusal, facts["refused"])
    assert f"a start would refuse: {refusal}" in said


def test_a_plan_refuses_the_folder_of_another_run(planned, tmp_path, capsys):
    file = tmp_path / "teacher.toml"
    file.write_text(TEACHER.format(out=tmp_path, steps=2))
    assert main(["train", str(file)]) == 0
    assert planned(file)[0] == 0
    before = sorted((tmp_path / "teacher").rglob("*"))
    code, facts, _ = planned(file, "--set", "train.lr=1e-5")
    assert code == 2 and "holds a run of another recipe" in facts["refused"][0] and "train.lr" in facts["refused"][0]
    assert sorted((tmp_path / "teacher").rglob("*")) == before


def test_a_published_model_is_known_by_the_name_of_its_folder_before_it_is_there(planned, image_recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, facts, _ = planned(image_recipe, "--set", "model.path=models/Flex.1-alpha", "--no-forecast")
    assert code == 2 and "no such folder" in facts["refused"][0]
    assert 8e9 < facts["network_parameters"] < 9e9
    assert "network_parameters" not in planned(image_recipe, "--set", "model.path=models/nowhere", "--no-forecast")[1]
