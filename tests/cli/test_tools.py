"""The way of the demo, from teacher to report, on tiny models: every tool, every file, and running it all again."""

import json
from pathlib import Path

import pytest
from by_file import tool
from PIL import Image
from written import marked

from dedistill.recipe import load_recipe
from dedistill.report.story import MARGINS, story_checks
from dedistill.train import main

ROOT = Path(__file__).parents[2]
TINY = ["model.new.layers=1", "model.new.single_layers=1", "model.new.heads=2", "validate.samples=32"]


def small(name: str, folder: Path) -> Path:
    """A shipped recipe in ``folder``, extended to be tiny; its paths are relative, so the test runs inside ``folder``."""
    model = "[model.new]\nlayers = 1\nsingle_layers = 1\nheads = 2\n" if name == "teacher" else ""
    steps = {"teacher": 60, "student": 40, "dedistill": 8}[name]
    every = 4 if name == "dedistill" else 50
    run = f'[run]\nname = "digits-{name}"\nout = "runs/digits/{name}"\n'
    text = f'extends = "dedistill:digits/{name}"\n{run}{model}[train]\nsteps = {steps}\nwarmup = 2\nbatch = 16\n'
    text += f"[validate]\nevery = {every}\nsamples = 32\n"
    if name == "dedistill":
        text += "[snapshot]\nevery = 2\n"
    file = folder / "small" / f"{name}.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A finished tiny story in its own folder."""
    folder = tmp_path_factory.mktemp("story")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipes = {name: small(name, folder) for name in ("teacher", "student", "dedistill")}
        assert main([str(recipes["teacher"])]) == 0
        pairs = ["--out", "runs/digits/pairs", "--count", "64", "--steps", "4", "--points", "4", "--shard-size", "32"]
        assert tool("make_pairs", recipes["teacher"], *pairs) == 0
        assert main([str(recipes["student"])]) == 0
        assert main([str(recipes["dedistill"])]) == 0
        assert tool("posthoc_ema", "runs/digits/dedistill") == 0
    return folder


def test_posthoc_files_are_the_ten_of_the_seed(story):
    names = {p.name for p in (story / "runs/digits/dedistill/posthoc").iterdir()}
    alphas = ("0.2", "0.4", "0.6", "0.8", "0.9", "0.95", "0.975", "0.99", "0.995", "0.999")
    assert names == {f"alpha_linear_{a}.safetensors" for a in alphas}


def test_posthoc_prints_weights_size_and_age(story, monkeypatch, capsys):
    monkeypatch.chdir(story)
    assert tool("posthoc_ema", "runs/digits/dedistill", "--alpha", "0.5", "--out", "elsewhere") == 0
    out = capsys.readouterr().out
    assert "4 snapshots, steps 2 to 8" in out
    assert "8:0.500  6:0.250  4:0.125  2:0.125" in out and " 2.91 " in out and " 1.8 " in out


def test_an_alpha_given_twice_is_made_once(story, monkeypatch, capsys):
    monkeypatch.chdir(story)
    assert tool("posthoc_ema", "runs/digits/dedistill", "--alpha", "0.5", "0.50", "1", "--out", "twice") == 0
    assert "2 averages in twice/" in capsys.readouterr().out
    assert sorted(p.name for p in Path("twice").iterdir()) == ["alpha_linear_0.5.safetensors", "alpha_linear_1.safetensors"]
    assert tool("posthoc_ema", "runs/digits/dedistill", "--alpha", "2") == 2


def test_averages_made_again_are_the_same_bytes(story, monkeypatch):
    monkeypatch.chdir(story)
    for folder in ("once", "again", "again"):  # also over those that stand there
        assert tool("posthoc_ema", "runs/digits/dedistill", "--alpha", "0.5", "0.9", "--out", folder) == 0
    first, second = ({p.name: p.read_bytes() for p in Path(folder).iterdir()} for folder in ("once", "again"))
    assert first == second and len(first) == 2


def test_sweep_folder(story, monkeypatch):
    monkeypatch.chdir(story)
    chosen = [
        "--candidates",
        "base",
        "alpha_linear_0.9",
        "last",
        "--cfg",
        "1",
        "3",
        "--skip",
        "0",
        "1",
        "--prompts",
        "3",
        "--steps",
        "2",
    ]
    assert tool("cfg_sweep", "small/dedistill.toml", *chosen) == 0
    folder = story / "runs/digits/dedistill/sweep"
    rows = json.loads((folder / "index.json").read_text())
    assert {r["candidate"] for r in rows} == {"base", "alpha_linear_0.9", "last"}
    assert len(rows) == 3 * 3 * 3  # CFG 1 has no second skip
    for row in rows:
        assert {
            "file",
            "candidate",
            "cfg",
            "skip",
            "prompt",
            "seed",
            "saturated",
            "contrast",
            "detail",
            "correct",
        } <= row.keys()
        assert Image.open(folder / row["file"]).size == (16, 8)
    assert (folder / "index.html").exists() and len(list((folder / "sheets").glob("*.png"))) >= 3
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.png") if "sheets" not in str(p)}
    assert tool("cfg_sweep", "small/dedistill.toml", *chosen) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}, "images that are there were made again"


def hashed_once(base: Path, files_read, averages: int) -> bool:
    """Whether the base and each of so many averages were read for their hashes, once each, however many candidates."""
    read = {file: count for file, count in files_read.items() if file.resolve().is_relative_to(base.resolve())}
    assert any(file.suffix == ".safetensors" for file in read)
    found = [file for file in files_read if file.parent.name == "posthoc"]
    return len(found) == averages and {*read.values(), *(files_read[file] for file in found)} == {1}


def test_a_base_is_hashed_once_however_many_candidates(story, monkeypatch, tmp_path, files_read):
    """Twelve of one base: its ten averages, itself, and the last weights."""
    monkeypatch.chdir(story)
    small = ["--prompts", "1", "--cfg", "1", "--skip", "0", "--steps", "1", "--out", str(tmp_path)]
    assert tool("cfg_sweep", "small/dedistill.toml", *small) == 0
    assert hashed_once(Path(load_recipe("small/dedistill.toml").model.path), files_read, averages=10)


def test_evaluation_answers_after_a_run(story, monkeypatch, capsys, files_read):
    """One command: every page, three answers with intervals, two step counts; run again it makes nothing twice."""
    monkeypatch.chdir(story)
    few = ["--prompts", "16", "--samples", "16", "--cfg", "1", "3", "--steps", "2", "3"]
    chosen = ["--candidates", "base", "alpha_linear_0.9", "last"]
    assert tool("evaluate", "small/dedistill.toml", *chosen, *few) == 0
    assert hashed_once(Path(load_recipe("small/dedistill.toml").model.path), files_read, averages=1)
    said = capsys.readouterr()
    folder = story / "runs/digits/dedistill/evaluation"
    answers = [a["answer"] for a in json.loads((folder / "evaluation.json").read_text())["answers"]]
    assert len(answers) == 3 and all(a in said.out for a in answers) and "accuracy" in answers[2]
    cells = json.loads((folder / "selection/selection.json").read_text())["cells"]
    assert {(c["cfg"], c["steps"]) for c in cells} == {(1, 2), (3, 2), (1, 3), (3, 3)}
    told = {"accuracy", "precision", "saturated", "clipped", "shadow", "blur", "contrast", "detail"}
    assert {*cells[0]["numbers"]} == told
    before = {p: p.stat().st_mtime_ns for p in [*folder.rglob("cell.json"), *folder.rglob("answers/*.json")]}
    assert tool("evaluate", "small/dedistill.toml", *chosen, *few) == 0
    assert capsys.readouterr().out == said.out and before == {p: p.stat().st_mtime_ns for p in before}
    assert "dedistill posthoc RUN makes them" not in said.err
    html = (folder / "sweep/index.html").read_text()
    assert 'data-kind="steps" value="3"' in html and (folder / "sweep/sheets/last_steps3.png").is_file()
    assert (folder / "sweep/images/last/cfg3_skip0_steps3/p000_s0.png").is_file()


def test_influence_folder_is_a_recipe(story, monkeypatch, capsys):
    """The tool's fragment is a recipe that trains as many numbers as the tool said."""
    monkeypatch.chdir(story)
    (story / "prompts.txt").write_text("3 seven\none two\n")
    arguments = ["--prompts", "prompts.txt", "--sigmas", "2", "--budget", "0.03M"]
    assert tool("layer_influence", "small/dedistill.toml", *arguments) == 0
    folder = story / "runs/digits/dedistill/influence"
    numbers = json.loads((folder / "influence.json").read_text())
    assert numbers["prompts"] == 2 and numbers["sigmas"] == [1.0, 0.5] and numbers["budget"] == 30_000
    assert f"{numbers['parameters']:,} trained parameters" in capsys.readouterr().err
    out = {"train.steps": 1, "train.warmup": 0, "run.out": "'runs/influence'"}
    assert main([str(folder / "influence.toml"), *(w for k, v in out.items() for w in ("--set", f"{k}={v}"))]) == 0
    facts = json.loads((story / "runs/influence/plan.json").read_text())["effects"]
    assert facts["trained_parameters"] == numbers["parameters"]


def test_distillation_is_measured(story, monkeypatch, capsys):
    """The base and the last weights of a run, with the judge's numbers; held-out data from another recipe if need be."""
    monkeypatch.chdir(story)
    few = ["--prompts", "6", "--samples", "32", "--steps", "4", "--few", "1", "2", "--cfg", "3", "1"]
    assert tool("measure_distillation", "small/dedistill.toml", "--candidates", "base", "last", *few) == 0
    folder = story / "runs/digits/dedistill/distillation"
    found = json.loads((folder / "distillation.json").read_text())
    assert [*found["candidates"]] == ["base", "last"] and found["reference"] == "base"
    numbers = found["candidates"]["last"]
    assert {"loss", "guidance", "straightness", "correct", "realistic", "response_saturated"} <= numbers.keys()
    assert [r["at"] for r in numbers["correct"]] == [1.0, 3.0] and numbers["loss"][0]["verdict"]
    assert "base: held-out loss" in capsys.readouterr().err and (folder / "index.html").exists()
    with_data = ["--data", "small/dedistill.toml", "--out", "measured", *few]
    assert tool("measure_distillation", "small/student.toml", *with_data) == 0
    assert "digits-student" in json.loads((story / "measured/distillation.json").read_text())["candidates"]


def test_what_is_written_has_the_names_that_ownership_looks_for(story):
    """Else a file of the user's would be written over, in a folder that holds other things as well."""
    assert marked(story) >= {"run", "pairs"}  # and whatever the tests before have made


def test_distillation_of_another_family_is_measured(image_recipe, tmp_path):
    """Latents, cached captions, images of several sizes, no judge; during training and after it."""
    settings = ["data.resolutions=[48, 64]", "data.max_upscale=2", "data.held_out=0.5", "meters.every=2", "meters.samples=4"]
    settings = [a for s in (*settings, "meters.steps=2") for a in ("--set", s)]
    assert main([str(image_recipe), "--debug", *settings]) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["guidance_gap"] > 0 and last["straightness"] > 0
    few = ["--prompts", "3", "--samples", "16", "--steps", "3", "--few", "1", "2", "--cfg", "1", "2"]
    assert tool("measure_distillation", image_recipe, "--candidates", "base", "last", *few, *settings) == 0
    numbers = json.loads((tmp_path / "run/distillation/distillation.json").read_text())["candidates"]["last"]
    assert numbers["loss"][0]["value"] > 0 and len(numbers["contrast"]) == 2 and "correct" not in numbers


def test_identity_follows_what_a_image_depends_on(story, tmp_path, monkeypatch):
    """Images of another base, arithmetic or grid are not taken for those of this one."""
    import shutil

    from dedistill.evaluation.candidates import candidates_of
    from dedistill.recipe import load_recipe

    shutil.copytree(story, tmp_path / "copy", ignore=shutil.ignore_patterns("sweep", "pairs"))
    monkeypatch.chdir(tmp_path / "copy")

    def identity(*settings: str) -> str:
        return candidates_of(load_recipe("small/dedistill.toml", list(settings)), ["last"])[0].weights

    first = identity()
    assert identity() == first == identity("train.lr=1e-5") == identity("timesteps.shift=3.0")
    others = [identity("train.precision=bf16"), identity("sample.shift=3.0"), identity("model.mask=none")]
    facts = Path("runs/digits/student/model/dedistill.json")
    facts.write_text(facts.read_text().replace('"mask": "none"', '"mask": "bool"'))
    others.append(identity())
    around = "model.components='runs/digits/teacher/model'"
    others.append(identity(around))
    weights = next(Path("runs/digits/teacher/model").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    others.append(identity(around))
    assert len({first, *others}) == 7


def test_report(story, monkeypatch, capsys):
    monkeypatch.chdir(story)
    arguments = ["small", "--out", "runs/digits/report", "--cfg", "1", "2", "4", "--prompts", "8", "--steps", "2"]
    assert tool("lab.story", *arguments) == 1, "models this small cannot hold what the demo's can"
    summary = json.loads((story / "runs/digits/report/summary.json").read_text())
    for name in ("teacher", "student", "dedistilled"):
        assert summary[name]["fm_loss"] > 0 and set(summary[name]["cfg"]) == {"1", "2", "4"}
        assert {"accuracy", "frechet", "saturated", "precision"} <= summary[name]["cfg"]["4"].keys()
    assert summary["student_native"]["steps"] == 4 and summary["student"]["steps"] == 2
    said, err = capsys.readouterr()
    assert "claims do not hold" in err and "Guidance is baked in" in err and "Traceback" not in err
    assert "accuracy / Frechet distance / saturated / precision" in said and "CFG is broken" in said
    for file in ("index.html", "story.png", "sweep/index.html", "sweep/index.json"):
        assert (story / "runs/digits/report" / file).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("posthoc_ema", "nowhere"), "'nowhere': no such run; dedistill train makes it"),
        (("cfg_sweep", "small/dedistill.toml", "--candidates", "alpha_9"), "no candidate 'alpha_9'"),
        (
            ("cfg_sweep", "small/teacher.toml", "--candidates", "base"),
            "'base' in 'runs/digits/teacher'; there are last",
        ),
        (("cfg_sweep", "small/teacher.toml", "--candidates", "posthoc"), "no averages in 'runs/digits/teacher/posthoc'"),
        (("cfg_sweep", "small/dedistill.toml", "--prompts", "no.txt"), "neither a number nor a readable text file"),
        (("lab.story", "small", "--out", "x", "--cfg", "2"), "needs the scales 1, 2 and 4"),
        (("make_pairs", "small/teacher.toml", "--out", "p", "--steps", "5"), "does not divide"),
        (("make_pairs", "small/teacher.toml", "--out", "runs/digits/pairs", "--cfg", "2"), "holds pairs made differently"),
        (("make_pairs", "small/teacher.toml", "--out", "p", "--set", "run.out='new'"), "train this recipe first"),
        (("make_pairs", "small/teacher.toml", "--out", "p", "--points", "0"), "--points: expects a whole number of at least 1"),
        (("cfg_sweep", "small/dedistill.toml", "--cfg", "nan"), "--cfg: expects a finite number, got 'nan'"),
        (("cfg_sweep", "small/dedistill.toml", "--skip", "-1"), "--skip: expects a whole number of at least 0"),
        (("cfg_sweep", "small/dedistill.toml", "--prompts", "0"), "neither a number nor a readable text file"),
        (("evaluate", "small/dedistill.toml", "--prompts", "16", "--samples", "9"), "--samples: 9 are too few for intervals"),
        (("evaluate", "small/student.toml"), "name one that trains on data with --data"),
        (("measure_distillation", "small/student.toml"), "name one that trains on data with --data"),
        (("measure_distillation", "small/dedistill.toml", "--reference", "x"), "no candidate 'x'; there are base"),
        (
            ("measure_distillation", "no.toml", "--steps", "8", "--few", "4", "8", "16"),
            "--few: 8, 16 steps are no fewer than --steps 8",
        ),
        (("posthoc_ema", "runs/digits/dedistill", "--alpha", "1.5"), "alpha = 1.5"),
        (("layer_influence", "small/dedistill.toml", "--prompts", "2", "--sigmas", "1", "--budget", "9"), "--budget: 9 is too"),
        (
            ("layer_influence", "small/dedistill.toml", "--budget", "6 M B"),
            "--budget: expects a whole number of at least 1, or",
        ),
    ],
)
def test_tools_say_what_is_wrong(story, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(story)
    assert tool(*arguments) in (1, 2)
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize("story_name", ["digits", "mnist"])
def test_committed_story_holds_its_claims(story_name):
    """The numbers of the README's runs."""
    checks = story_checks(_committed(story_name), MARGINS[story_name])
    assert len(checks) == 5 and [c["text"] for c in checks if not c["ok"]] == []


@pytest.mark.parametrize(
    ("stage", "change", "claim"),
    [
        ("student", lambda s: s["cfg"]["1"].update(accuracy=0.8), "Guidance is baked in"),
        ("student", lambda s: s["cfg"]["4"].update(frechet=3.0), "CFG is broken"),
        ("dedistilled", lambda s: s["cfg"]["1"].update(accuracy=0.9), "Guidance is out again"),
        ("dedistilled", lambda s: s["cfg"]["1"].update(accuracy=0.6), "Guidance is out again"),
        ("dedistilled", lambda s: s.update(fm_loss=0.5), "The flow is back"),
        ("dedistilled", lambda s: s["cfg"]["4"].update(frechet=3.0), "CFG works again"),
    ],
)
def test_a_claim_that_does_not_hold_is_found(stage, change, claim):
    summary = _committed("digits")
    change(summary[stage])
    assert [c["text"].startswith(claim) for c in story_checks(summary, MARGINS["digits"]) if not c["ok"]] == [True]


def _committed(name: str) -> dict:
    return json.loads((ROOT / f"lab/results/{name}_story.json").read_text())
