"""One command for everything: what it lists, what each says of itself, and what is imported for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from image_files import write_images

from dedistill import __version__
from dedistill.cli.main import COMMANDS, main
from dedistill.io.ownership import hold
from dedistill.recipe.shipped import shipped_recipes

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers")
LIGHT = [
    ["--version"],
    ["--help"],
    *([name, "--help"] for name in COMMANDS),
    ["train", "dedistill:flux_schnell", "--print-recipe"],
    ["recipes"],
    ["recipes", "show", "digits/teacher"],
    ["check", "dedistill:flux_dev"],
    ["check", "no.toml"],
    ["report", "runs/none"],
    ["posthoc", "runs/none"],
    ["train", "dedistill:flux_tiny"],
    ["trian"],
]
LOADED = f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"


def modules_after(lines: list[list[str]]) -> str:
    """Which of HEAVY one process has imported after these command lines."""
    code = f"""import json, sys
from dedistill.cli.main import main
for line in json.loads(sys.argv[1]):
    try:
        main(line)
    except SystemExit:
        pass
{LOADED}"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(lines)], env=environment, capture_output=True, text=True)
    return done.stderr.splitlines()[-1]


def test_light_commands_stay_light(tmp_path):
    """Nothing heavy for help, recipes, checks of a recipe, and a look at a data set."""
    assert modules_after(LIGHT) == "[]"
    write_images(tmp_path / "photos", 3)
    assert modules_after([["scan", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]]) == "[]"
    assert (tmp_path / "out/index.html").exists()


@pytest.mark.long
def test_averages_and_pages_need_no_library_of_models(tmp_path, adapter_recipe):
    """Averages are sums of tensors: torch, and nothing of diffusers or transformers. A page of curves needs neither."""
    run = tmp_path / "dedistill"
    assert main(["train", str(adapter_recipe), "--set", "train.steps=2", "--set", "snapshot.every=1"]) == 0
    assert modules_after([["posthoc", str(run), "--alpha", "0.5"]]) == "['torch']"
    assert (run / "posthoc/alpha_linear_0.5.safetensors").exists()
    assert modules_after([["report", str(run)], ["report", str(adapter_recipe)]]) == "[]"
    assert (run / "report/index.html").exists()


def test_a_check_of_an_adapter_reads_headers(tmp_path, adapter_recipe):
    """Of a base that is there: its shapes and numbers come from its files, without the class of its network."""
    run = tmp_path / "dedistill"
    assert main(["train", str(adapter_recipe), "--set", "train.steps=1", "--set", "snapshot.every=1"]) == 0
    assert modules_after([["check", str(run / "snapshots/step-00000001.safetensors")]]) == "['torch']"


def test_a_second_process_on_a_run_is_refused_before_torch_is_loaded(teacher_recipe, tmp_path):
    run = tmp_path / "teacher"
    run.mkdir()
    with hold(run, "run.out"):
        command = [sys.executable, "-X", "importtime", "-m", "dedistill", "train", str(teacher_recipe)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"another process is running in '{run}'" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.rpartition("|")[2].strip() in HEAVY]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_defaults_and_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and said.startswith(f"usage: dedistill {name} ")
    assert f"example: dedistill {name} " in f"{said} "
    assert not re.search(r"default: (None|False|\[)", said)
    valued = re.split(r" (?=--[\w-]+ (?:\{|[A-Z]))", said.partition(" options: ")[2].partition(" example: ")[0])[1:]
    assert all("default" in text or "(required)" in text for text in valued), valued
    usage, _, places = said.partition(" options: ")[0].partition(" positional arguments: ")
    assert "default: " in places or not re.search(r"\[\{[^}]*\}\]", usage), "a choice that may be left out"
    if "--set KEY" in said:
        assert "may be repeated" in said


@pytest.mark.parametrize("words", [["train", "x.toml"], ["sweep", "x.toml"], ["report", "x"]])
def test_set_takes_one_key(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--set", "train.lr=1e-4", "train.steps=7"])
    assert ended.value.code == 2 and "repeat it for more" in capsys.readouterr().err


def test_the_tools_are_the_commands(capsys):
    """A tool of each command that had one before; nothing else is in its file."""
    named = {}
    for file in set(ROOT.glob("tools/*.py")) - {ROOT / "tools/make_schema.py"}:
        lines = [line for line in file.read_text().splitlines() if line]
        assert len(lines) == 3, file
        named[file.stem] = re.fullmatch(r"from dedistill\.cli\.(\w+) import main", lines[1])[1]
    assert len(named) == 12 and set(named.values()) <= set(COMMANDS)


def test_module_and_console_script_are_the_same():
    done = subprocess.run([sys.executable, "-m", "dedistill", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == f"dedistill {__version__}"
    assert 'dedistill = "dedistill.cli.main:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("wrong", "message"), [("trian", "did you mean 'train'?"), ("--zzz", "train, launch, plan, rehearse")])
def test_unknown_commands(wrong, message, capsys):
    assert main([wrong]) == 2
    err = capsys.readouterr().err
    assert f"unknown command '{wrong}'" in err and message in err


def test_recipes_say_what_each_needs(capsys):
    """Hardware, model and data of every one; the text of one is its file, without a path that leads nowhere from elsewhere."""
    assert main(["recipes"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [f"dedistill:{name}" for name in shipped_recipes()]
    assert all(f"\n  {key} " in block for block in blocks for key in ("Hardware", "Model", "Data"))
    assert main(["recipes", "show", "dedistill:flux_dev"]) == main(["recipes", "show", "flux_dev"]) == 0
    schema, _, text = shipped_recipes()["flux_dev"].read_text().partition("\n")
    assert schema.startswith("#:schema") and capsys.readouterr().out == 2 * text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipes", "show", "flux_schnel"), "did you mean 'dedistill:flux_schnell'?"),
        (("recipes", "show", "../recipe/schema"), "no recipe of this name"),
        (("recipes", "show"), "show needs the NAME of a recipe"),
        (("recipes", "list", "x"), "list takes no name, got 'x'"),
        (
            ("check", "dedistill:flux_schnel"),
            "dedistill:flux_schnel: no recipe of this name comes with dedistill, did you mean",
        ),
        (("check", "no.toml"), "no.toml: no such file"),
        (("check", "recipes/flux_dev.toml"), "no such file, did you mean 'dedistill:flux_dev'?"),
        (("check", "no.toml", "--model", "x"), "--model: belongs to adapter files"),
        (("check", "no.safetensors"), "no.safetensors"),
        (("posthoc", "runs/none"), "'runs/none': no such run; dedistill train makes it"),
        (("report", "runs/none"), "'runs/none': no such run"),
        (("report", "dedistill:flux_lora"), "'runs/flux_lora': no such run"),
        (("posthoc", "dedistill:flux_loar"), "did you mean 'dedistill:flux_lora'?"),
        (("demo", "letters"), "invalid choice: 'letters'"),
        (("tiny", "fluxx", "x"), "FAMILY: unknown family 'fluxx', did you mean 'flux'?"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*arguments])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code in (1, 2) and message in err and "Traceback" not in err and "internal" not in err
    assert not list(tmp_path.iterdir())


def test_check_says_that_a_recipe_is_right(capsys):
    assert main(["check", "dedistill:flux_schnell_24gb"]) == 0
    assert "20,000 steps, batch 16, into runs/flux_schnell_24gb/" in capsys.readouterr().out
