"""Whatever a command is told to write to, what the user keeps there stays as it was, and the refusal names it."""

import json
import tarfile
from pathlib import Path

import pytest
from by_file import tool
from tiny_recipes import TEACHER
from written import marked

from dedistill.io import ownership
from dedistill.train import main

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def filled(folder: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return contents(folder)


@pytest.fixture
def refused(capsys):
    """Whether ``command`` refuses, naming ``word``, and leaves ``folder`` as it is."""

    def check(command, folder: Path, word: str) -> bool:
        before = contents(folder)
        capsys.readouterr()
        code, said = command(), capsys.readouterr().err
        assert code in (1, 2) and word in said and str(folder) in said, said
        return contents(folder) == before

    return check


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Recipe of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "teacher.toml").write_text(TEACHER.format(out=folder, steps=2))
    assert main([str(folder / "teacher.toml")]) == 0
    return folder / "teacher.toml"


# --- a run's folder


def test_a_folder_that_is_no_run_is_refused(teacher_recipe, tmp_path, refused):
    names = ("save", "sample", "stop", "plan.json", "recipe.json", "inputs.json", "recipe.toml", "timings.jsonl")
    filled(tmp_path / "teacher", *names)
    assert refused(lambda: main([str(teacher_recipe)]), tmp_path / "teacher", "run.out")


def test_a_run_is_refused_in_the_folder_of_something_else(teacher_recipe, tmp_path, refused):
    ownership.claim(tmp_path / "teacher", "pairs", "--out")
    assert refused(lambda: main([str(teacher_recipe)]), tmp_path / "teacher", "set of pairs")


def test_what_other_tools_left_in_a_run_that_is_yet_to_be_is_no_hindrance(teacher_recipe, tmp_path):
    assert tool("layer_influence", teacher_recipe, "--budget", "100K", "--prompts", "2", "--sigmas", "2") == 0
    (tmp_path / "teacher" / ".gitkeep").touch()
    assert main([str(teacher_recipe)]) == 0


@pytest.mark.parametrize("spelling", ["recipe.toml", "../teacher/recipe.toml", "link", "extended"])
def test_a_recipe_kept_in_its_run_is_never_replaced(tmp_path, spelling, monkeypatch):
    run, text = tmp_path / "teacher", "# MY NOTES\n" + TEACHER.format(out=tmp_path, steps=2)
    run.mkdir()
    (run / "recipe.toml").write_text(text)
    recipe = run / spelling
    if spelling == "link":
        recipe = tmp_path / "link.toml"
        recipe.symlink_to(run / "recipe.toml")
    if spelling == "extended":
        recipe = tmp_path / "other.toml"
        recipe.write_text('extends = "teacher/recipe.toml"\nrun = {name = "other", out = "' + str(run) + '"}\n')
    for _ in range(2):
        assert main([str(recipe)]) == 0
        assert (run / "recipe.toml").read_text() == text
    copy = tmp_path / "copy.toml"  # not the file in the run any more: that stays the user's all the same
    copy.write_text(text)
    assert main([str(copy)]) == 0 and (run / "recipe.toml").read_text() == text
    assert main([str(run / "recipe.resolved.toml")]) == 0, "the resolved recipe is that of the run"


@pytest.mark.parametrize("name", ["recipe.json", ".dedistill", "recipe.resolved.toml"])
def test_a_recipe_under_the_name_of_a_file_of_ours_is_refused(name, tmp_path, refused):
    run = tmp_path / "teacher"
    run.mkdir()
    (run / name).write_text(TEACHER.format(out=tmp_path, steps=2))
    assert refused(lambda: main([str(run / name)]), run, "another name")


def test_only_empty_files_are_requests(teacher_recipe, tmp_path, capsys):
    assert main([str(teacher_recipe)]) == 0
    run = tmp_path / "teacher"
    (run / "stop").write_text("mine")
    (run / "save").symlink_to(run / "stop")
    (run / "sample").touch()
    capsys.readouterr()
    assert main([str(teacher_recipe), "--set", "train.steps=6"]) == 0
    said = capsys.readouterr().err
    assert (run / "stop").read_text() == "mine" and (run / "save").is_symlink() and not (run / "sample").exists()
    for name in ("stop", "save"):
        assert said.count(f"'{run / name}' is not an empty file") == 1
    assert f"'{run / 'sample'}' was there before the start and is removed" in said


def test_a_model_folder_that_is_no_export_is_not_replaced(teacher_recipe, tmp_path, refused):
    assert main([str(teacher_recipe), "--set", "train.steps=2", "--set", "run.name='x'"]) == 0
    model = tmp_path / "teacher" / "model"
    for name in ("run.json", "dedistill.json"):
        (model / name).unlink()
    filled(model, "notes.txt")
    assert refused(lambda: main([str(teacher_recipe), "--set", "run.name='x'"]), model, "replaced")


def test_temporary_files_of_others_stay(teacher_recipe, tmp_path):
    assert main([str(teacher_recipe)]) == 0
    run = tmp_path / "teacher"
    before = filled(run, "metrics.jsonl.tmp-backup", "recipe.old.tmp-1", "list.jsonl.tmp-dedistill", "plan.json.tmp-77")
    left = "snapshots/step-00000001.safetensors.tmp-dedistill"
    ours = filled(run, "plan.json.tmp-dedistill", "model.tmp-dedistill-1-old/x", left)
    assert main([str(teacher_recipe)]) == 0
    kept = contents(run)
    assert all(kept.get(n) == before[n] for n in before if ".tmp-" in n and n not in ours)
    assert not any(".tmp-dedistill" in n for n in kept if n != "list.jsonl.tmp-dedistill")


# --- rehearsals


def test_a_rehearsal_replaces_nothing_but_a_rehearsal(adapter_recipe, tmp_path, refused):
    out = tmp_path / "dedistill-rehearsal"
    assert main([str(adapter_recipe), "--set", f"run.out={out}"]) == 0  # a run that happens to have that name
    (out / "notes.txt").write_text("mine")
    assert refused(lambda: main([str(adapter_recipe), "--rehearse"]), out, "rehearsal")


def test_a_rehearsal_is_repeated_and_notes_in_it_stay(adapter_recipe, tmp_path):
    out = tmp_path / "dedistill-rehearsal"
    assert main([str(adapter_recipe), "--rehearse"]) == 0
    (out / ownership.MARK).unlink()  # as an earlier version left it
    filled(out, "notes.txt", "run/old")
    assert main([str(adapter_recipe), "--rehearse"]) == 0
    assert (out / "notes.txt").read_text() == "mine" and not (out / "run" / "old").exists()


# --- output folders


def test_pairs_go_into_no_other_data_set(teacher, tmp_path, refused):
    filled(tmp_path / "set", "00000.tar", "cat.jpg")
    pairs = ("make_pairs", teacher, "--out", tmp_path / "set", "--count", "4", "--steps", "4", "--points", "2")
    assert refused(lambda: tool(*pairs), tmp_path / "set", "--out")


@pytest.mark.parametrize("name", ["cfg_sweep", "evaluate", "measure_distillation", "layer_influence"])
def test_results_go_into_no_folder_of_others(name, teacher, tmp_path, refused):
    filled(tmp_path / "site", "index.html", "index.json", "scores.json", "thumbs/holiday.webp", "sweep/index.html")
    assert refused(lambda: tool(name, teacher, "--prompts", "16", "--out", tmp_path / "site"), tmp_path / "site", "--out")


def test_a_scan_goes_into_no_folder_of_others(photos, tmp_path, refused):
    filled(tmp_path / "site", "index.html", "scan.json")
    assert refused(lambda: tool("scan_data", photos, "--out", tmp_path / "site"), tmp_path / "site", "--out")


def test_a_report_replaces_no_page_of_others(teacher, refused):
    page = teacher.parent / "teacher" / "report"
    filled(page, "index.html")
    assert refused(lambda: tool("report_run", teacher), page, "page's folder")
    (page / "index.html").unlink()
    assert tool("report_run", teacher) == 0
    (page / ownership.MARK).unlink()  # as an earlier version left it
    assert tool("report_run", teacher) == 0


def test_a_sweep_is_made_again_and_removes_only_its_own_thumbnails(teacher, tmp_path):
    sweep = ("cfg_sweep", teacher, "--cfg", "1", "--steps", "2", "--prompts", "2", "--out", tmp_path / "sweep")
    assert tool(*sweep) == 0
    (tmp_path / "sweep" / ownership.MARK).unlink()  # as an earlier version left it
    filled(tmp_path / "sweep" / "thumbs", "holiday.webp", f"{'0a' * 12}.webp")
    assert tool(*sweep) == 0
    assert [p.name for p in (tmp_path / "sweep" / "thumbs").iterdir()] == ["holiday.webp"]


def test_a_cache_is_made_in_no_folder_of_images(image_recipe, tmp_path, refused):
    filled(tmp_path / "cache", "index.jsonl", "quarantine.txt", "day/photo.tmp-1")
    assert refused(lambda: main([str(image_recipe), "--cache-only"]), tmp_path / "cache", "data.cache")


NOTES = ("notes.txt", "hub/blobs/0a", "Index", "scores.csv", "step-1.safetensors.bak", "my.report/index.html")


def test_what_is_not_in_the_way_stays_beside_what_is_written(teacher, teacher_recipe, tmp_path):
    """Notes, a hub's cache, tables of other names: nothing that is written has their names."""
    run, out = tmp_path / "teacher", tmp_path / "out"
    before = filled(run, *NOTES), filled(out, *NOTES, "holiday.jpg")
    pairs = ("make_pairs", teacher, "--out", out, "--count", "4", "--steps", "4", "--points", "2")
    for _ in range(2):
        assert main([str(teacher_recipe)]) == 0 and tool(*pairs) == 0
        assert all(contents(folder).items() >= old.items() for folder, old in zip((run, out), before))
    assert marked(tmp_path, "holiday.jpg", *(name.split("/")[0] for name in NOTES)) == {"run", "pairs"}


@pytest.mark.parametrize("name", ["Images/holiday.jpg", "SCORES.json", "thumbs"])
def test_names_that_some_disks_take_for_ours_are_in_the_way(name, teacher, tmp_path, refused):
    filled(tmp_path / "site", "notes.txt", name)
    sweep = ("cfg_sweep", teacher, "--cfg", "1", "--steps", "2", "--prompts", "2", "--out", tmp_path / "site")
    assert refused(lambda: tool(*sweep), tmp_path / "site", name)


def test_a_cache_and_a_run_among_the_images_are_no_part_of_them(own, capsys):
    """Nothing that is written there, previews above all, is taken for an image or a caption of the set."""
    recipe, photos = own
    before = contents(photos)
    settings = {"data.cache": photos, "run.out": photos / "run", "preview.every": 1, "preview.prompts": "['a']"}
    words = [str(recipe), *(w for k, v in settings.items() for w in ("--set", f"{k}={v}"))]
    assert main(words) == 0
    assert [*(photos / "run/previews").rglob("*.png")]
    recipe.write_text(recipe.read_text().replace("steps = ", "steps = 1", 1))
    capsys.readouterr()
    assert main(words) == 0, "the same set"
    assert "photos/run/previews/: dedistill made" in capsys.readouterr().err
    assert contents(photos).items() >= before.items() and marked(photos, *before) == {"cache", "run"}


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_where_a_file_is_no_folder_is_made(below, teacher_recipe, image_recipe, photos, tmp_path, refused):
    """The key is named, and the file that stands in the way."""
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    commands = {
        "run.out": lambda: main([str(teacher_recipe), "--set", f"run.out={file / below}"]),
        "data.cache": lambda: main([str(image_recipe), "--cache-only", "--set", f"data.cache={file / below}"]),
        "--out": lambda: tool("scan_data", photos, "--out", file / below),
    }
    for key, command in commands.items():
        assert refused(command, tmp_path, f"{key}: '{file}' is a file")


# --- single files


def test_averages_replace_nothing_but_averages(adapter_recipe, tmp_path, refused):
    assert main([str(adapter_recipe), "--set", "snapshot.every=1"]) == 0
    run, out = tmp_path / "dedistill", tmp_path / "weights"
    average = ("posthoc_ema", run, "--alpha", "0.5", "--out", out)
    filled(out, "alpha_linear_0.5.safetensors")
    assert refused(lambda: tool(*average), out, "not an average")
    (out / "alpha_linear_0.5.safetensors").unlink()
    assert tool(*average) == 0 and tool(*average) == 0


def test_an_export_leaves_the_config_of_its_neighbour(adapter_recipe, tmp_path, refused):
    assert main([str(adapter_recipe), "--set", "snapshot.every=1"]) == 0
    weights, model = sorted((tmp_path / "dedistill" / "snapshots").glob("*.safetensors"))[-1], _base(adapter_recipe)
    exports = tmp_path / "exports"
    export = lambda name: tool("export_model", weights, "--format", "lycoris", "--out", exports / name, "--model", model)  # noqa: E731
    assert export("a.safetensors") == 0 and export("b.safetensors") == 0, "the same config serves both"
    (exports / "lycoris_config.json").write_text(json.dumps({"algo": "locon"}))
    assert refused(lambda: export("c.safetensors"), exports, "lycoris_config.json")


def _base(recipe: Path) -> Path:
    from dedistill.recipe import load_recipe

    return Path(load_recipe(recipe).model.path)


@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere_is_the_user_s_as_well(target, adapter_recipe, tmp_path, refused):
    """A disk that is not mounted, say: neither the link nor what it will lead to is replaced."""
    assert main([str(adapter_recipe), "--set", "snapshot.every=1"]) == 0
    weights, model = sorted((tmp_path / "dedistill" / "snapshots").glob("*.safetensors"))[-1], _base(adapter_recipe)
    out = tmp_path / "out"
    out.mkdir()
    links = {name: out / name for name in ("a.safetensors", "folder", "alpha_linear_0.5.safetensors", "b/lycoris_config.json")}
    (out / "b").mkdir()
    for link in links.values():
        link.symlink_to(link if target == "itself" else tmp_path / "nowhere")
    adapter = ("export_model", weights, "--model", model, "--format")
    commands = {
        "a.safetensors": (*adapter, "transformer", "--out", out / "a.safetensors"),
        "folder": ("merge_adapter", adapter_recipe, "--weights", weights, "--out", out / "folder"),
        "alpha_linear_0.5.safetensors": ("posthoc_ema", tmp_path / "dedistill", "--alpha", "0.5", "--out", out),
        "b/lycoris_config.json": (*adapter, "lycoris", "--out", out / "b" / "c.safetensors"),
    }
    for name, command in commands.items():
        assert refused(lambda command=command: tool(*command), out, name)
        assert links[name].is_symlink() and not (tmp_path / "nowhere").exists()


# --- the home folder


def test_a_tilde_is_the_home_folder_in_recipes_and_on_command_lines(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (home / "base.toml").write_text(TEACHER.format(out="~", steps=2))
    (home / "teacher.toml").write_text('extends = "~/base.toml"\nrun = {name = "x", out = "~/teacher"}\n')
    assert main(["~/teacher.toml"]) == 0 and (home / "teacher" / "model").is_dir()
    assert tool("make_pairs", "~/teacher.toml", "--out", "~/pairs", "--count", "4", "--steps", "4", "--points", "2") == 0
    with tarfile.open(home / "pairs" / "00000.tar") as tar:
        assert tar.getnames()
    (home / "prompts.txt").write_text("one two\n")
    assert tool("cfg_sweep", "~/teacher.toml", "--cfg", "1", "--prompts", "~/prompts.txt", "--out", "~/sweep") == 0
    assert tool("report_run", "~/teacher") == 0
    assert main(["~/teacher.toml", "--set", "run.out=~nobody-of-that-name/x"]) == 2
    assert "run.out: must begin with a home folder that is known here" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]


def test_every_place_in_a_recipe_knows_the_home_folder(monkeypatch):
    from dedistill.recipe.data_tables import Data, ImageSet
    from dedistill.recipe.model_tables import Model
    from dedistill.recipe.schema import Run

    monkeypatch.setenv("HOME", "/home/me")
    places = [
        Run(name="a", out="~/x").out,
        Model(family="a", path="~/x").path,
        Model(family="a", components="~/x").components,
        Data(source="pairs", path="~/x").path,
        Data(source="pictures", cache="~/x").cache,
        ImageSet(path="~/x").path,
    ]
    assert set(places) == {"/home/me/x"} and Model(family="a", path="./~/x").path == "./~/x"
