"""What the README and the pages say exists, exists; what they say is printed, is printed."""

import io
import re
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest

from dedistill.cli.main import COMMANDS
from dedistill.cli.main import main as command_line
from dedistill.recipe import load_recipe
from dedistill.recipe.shipped import CHAIN, FOLDER, shipped_recipes
from dedistill.train import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {p.name: p.read_text() for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "LOG.md"}  # the log is history
TEXT = "\n".join([README, *PAGES.values()])
ROOMS = "dedistill/recipes|tools|launch|benchmarks|tests|docs"
PATHS = sorted(set(re.findall(rf"\b(?:{ROOMS})/[\w/.-]*\w|(?<!/)\blab/[\w/.-]*\w", TEXT)))


@pytest.mark.parametrize("path", PATHS)
def test_named_files_exist(path):
    if path in ("recipes/mine.toml",):
        return
    assert (ROOT / path).exists(), f"README names {path}"


def test_commands_name_real_tools_and_flags():
    commands = re.findall(r"(?:^    |^|`)dedistill (\w+)([^\n#`]*)", TEXT, flags=re.M)
    assert len(commands) > 20 and {name for name, _ in commands} <= {*COMMANDS, "COMMAND"}
    for name, flags in commands:
        if wanted := re.findall(r"--[\w-]+", flags.partition(">")[0]):
            assert set(wanted) <= options_of(name), f"{name}{flags}"


def options_of(command: str) -> set[str]:
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit):
        command_line([command if command in COMMANDS else "train", "--help"])
    return set(re.findall(r"--[\w-]+", said.getvalue()))


def test_commands_of_the_study_are_real_modules_and_flags():
    found = re.findall(r"python -m lab(?:\.(\w+))?([^\n#]*)", TEXT)
    assert {name for name, _ in found} == {"", "artefacts", "ladder", "mnist_flux", "story"}
    for name, flags in found:
        places = f"{name or 'study'}.py", f"{name}/study.py"
        source = next(file for file in map((ROOT / "lab").joinpath, places) if file.is_file()).read_text()
        assert all(f'"{flag}"' in source for flag in re.findall(r"--[\w-]+", flags)), f"{name}{flags}"


def test_error_line_is_the_real_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    text = (ROOT / "dedistill/recipes/digits/teacher.toml").read_text().replace("batch = 64", "bacth = 64")
    padding = 31 - next(i for i, line in enumerate(text.splitlines(), 1) if "bacth" in line)
    text = "\n" * padding + text if padding > 0 else "\n".join(text.splitlines()[-padding:])
    (tmp_path / "recipes/mine.toml").write_text(text)
    assert main(["recipes/mine.toml"]) == 2
    assert "recipes/mine.toml:31: train.bacth: unknown key, did you mean 'batch'?" in capsys.readouterr().err
    assert "recipes/mine.toml:31: train.bacth: unknown key, did you mean 'batch'?" in README


def test_print_recipe_and_plan_need_no_data(capsys):
    assert main([str(ROOT / "dedistill/recipes/digits/dedistill.toml"), "--print-recipe", "--set", "train.lr=2e-5"]) == 0
    assert "lr = 2e-05" in capsys.readouterr().out
    assert command_line(["plan", "dedistill:mnist_flux", "--no-forecast"]) == 0
    assert "samples      1,920,000" in capsys.readouterr().out


@pytest.mark.parametrize("name", shipped_recipes())
def test_recipe_headers_say_how_to_run_them(name):
    assert f"dedistill train dedistill:{name}" in shipped_recipes()[name].read_text()
    assert load_recipe(f"dedistill:{name}").run.out.startswith("runs/")


def test_named_recipes_come_with_the_package():
    named = re.findall(r"dedistill:([\w/]*)(?:\{([\w,]+)\})?(\w*)", TEXT)
    names = {a + part + b for a, parts, b in named for part in parts.split(",")}
    chains = {file.parent.name for file in FOLDER.rglob(CHAIN)}
    assert names - {"NAME"} <= {*shipped_recipes(), *chains} and len(names) > 10


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_links_lead_somewhere():
    """Relative links of the README and the pages; and the index names every page."""
    for place, text in {"README.md": README, **{f"docs/{name}": page for name, page in PAGES.items()}}.items():
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (ROOT / place).parent.joinpath(link).exists(), f"{place}: {link}"
    named = set(re.findall(r"^\| \[([\w.]+)\]", PAGES["index.md"], flags=re.M))
    assert named == {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_code_that_pages_name_exists():
    """Files, and dotted names: modules, and what is in them."""
    for file in set(re.findall(r"\b(?:dedistill|lab|tests|benchmarks)/[\w/]+\.py\b", TEXT)):
        assert (ROOT / file).exists(), file
    code = re.sub(r"`dedistill\.(json|sha256)`|\"dedistill\.families\"", "", TEXT)  # a file, a header, entry points
    names = set(re.findall(r"(?<![\w/.\"])dedistill(?:\.\w+)+", code))
    assert {"dedistill.load_lokr", "dedistill.models.flux.pipeline"} <= names
    for name in names:
        resolve_name(name)
    for module, imported in re.findall(r"^from (dedistill[\w.]*) import (\w+)$", TEXT, flags=re.M):
        assert hasattr(import_module(module), imported), f"{module}.{imported}"


def test_names_of_the_architecture_exist():
    """Classes and tables that it tells to add to."""
    source = "\n".join(p.read_text() for p in (ROOT / "dedistill").rglob("*.py"))
    names = set(re.findall(r"`(?:\w+\.)?([A-Z]\w+)`", PAGES["architecture.md"]))
    assert {"ModelSpec", "SOLVERS", "QUANTIZERS"} <= names
    for name in names:
        assert re.search(rf"^(class {name}\b|{name}\b.* = )", source, flags=re.M), name


def test_what_users_make_is_ignored_at_the_root_alone():
    """Not dedistill/data and dedistill/models, which are rooms."""
    lines = set((ROOT / ".gitignore").read_text().split())
    made = {"data/", "models/", "exports/", "runs/", "cache/"}
    assert {f"/{name}" for name in made} <= lines and not made & lines
