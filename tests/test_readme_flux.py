"""The README's way from images to a result, run as it stands: its recipe, its commands, its snippet, on tiny weights."""

import os
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from dedistill.cli.main import main
from dedistill.models.flux.tiny import write_tiny_flux

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text()
RELEASE = (ROOT / "docs/flux.md").read_text().partition("## Images, rehearsal, release\n")[2]
# what a test has no time for; everything else is the README's
SMALL = """
[data]
resolutions = [64]
[train]
steps = 6
batch = 4
micro_batch = 2
warmup = 1
[validate]
every = 3
samples = 4
[checkpoint]
every = 3
[snapshot]
every = 2
[preview]
every = 6
[sample]
steps = 2
height = 64
width = 64
"""


def blocks(language: str, text: str = SECTION) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's directory: a model, images."""
    folder = tmp_path_factory.mktemp("home")
    write_tiny_flux(folder / "models/FLUX.1-schnell")
    (folder / "data/images").mkdir(parents=True)
    for name, pixels in zip(("china", "flower"), load_sample_images().images):
        for i in range(2):
            Image.fromarray(pixels).resize((1100 + 96 * i, 800)).save(folder / f"data/images/{name}{i}.jpg")
            (folder / f"data/images/{name}{i}.txt").write_text(f"a {name}\na long caption " + "with many words " * 8)
    text = blocks("toml")[0]
    tables = {t.strip("[]") for t in re.findall(r"^\[\w+\]$", text, flags=re.M)}
    assert not tables & {t.strip("[]") for t in re.findall(r"^\[\w+\]$", SMALL, flags=re.M)}
    sets, rest = text[text.index("[[data.sets]]") :], text[: text.index("[[data.sets]]")]
    (folder / "my_flux.toml").write_text(rest + SMALL.replace("[train]", sets + "\n[train]"))
    return folder


def run(command: str) -> int:
    words = shlex.split(command)
    assert words[0] == "dedistill"
    try:
        return main(words[1:])
    except SystemExit as e:
        return e.code or 0


def test_the_whole_section(home, monkeypatch, capsys):
    """Every command in its order, then the snippet, then the question whether it worked."""
    monkeypatch.chdir(home)
    commands = [line for block in [*blocks("bash"), *blocks("bash", RELEASE)] for line in block.splitlines()]
    assert len(commands) == 9
    for command in commands:
        code, said = run(command), capsys.readouterr()
        assert code == 0, f"{command}\n{said.err}"
        if "rehearse" in command:
            assert len(re.findall(r"^ok ", said.out + said.err, flags=re.M)) == 11
        if "check" in command:
            assert "dedistill.load_lokr" in said.out, "it names the programs"
    for made in ("runs/scan/index.html", "runs/my_flux/sweep/index.html", "exports/my-model/model_index.json"):
        assert (home / made).exists(), made
    code = blocks("python")[0]
    small = {
        '"cuda"': '"cpu"',
        "torch.bfloat16": "torch.float32",
        "1024": "64",
        "true_cfg_scale=3.0": "true_cfg_scale=3.0, num_inference_steps=2",
    }
    for large, little in small.items():
        assert large in code
        code = code.replace(large, little)
    exec(code, {})
    with Image.open("fox.png") as image:
        assert image.size == (64, 64)
    os.remove("fox.png")
    judge(home, capsys)


def judge(home: Path, capsys) -> None:
    """The two commands by which a user knows whether it worked, on few samples and scales, all in one batch."""
    (home / "prompts.txt").write_text("".join(f"{n} red foxes\n" for n in range(16)))
    evaluate, report = re.findall(r"^    (dedistill (?:evaluate|report) .*)$", SECTION, flags=re.M)
    few = "--candidates base last --cfg 1 3 --samples 16 --set train.batch=16 --set train.micro_batch=16"
    assert run(f"{evaluate} {few}") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert all(question in said for question in ("How distilled is it still?", "Which weights?", "How to sample?")), said
    assert run(report) == 0, capsys.readouterr().err
    for page in re.findall(r"`(runs/my_flux/[\w/]*index\.html)`", SECTION):
        assert (home / page).exists(), page


def test_table_of_recipes():
    """The sizes it gives are those that a rehearsal counts."""
    from dedistill.adapters.targets import adaptable, count_parameters, resolve_targets
    from dedistill.models.registry import get_family
    from dedistill.recipe import load_recipe
    from dedistill.recipe.shipped import shipped_recipes

    rows = re.findall(r"^\| `dedistill:(\w+)` \|.*\| \d+ GB \| (\d+) M \|$", SECTION, flags=re.M)
    shipped = {n for n in shipped_recipes() if "/" not in n and load_recipe(f"dedistill:{n}").model.family == "flux"} - {
        "flux_tiny"
    }
    shown = {name for name, _ in rows}
    # a recipe in several sizes has one row, which names the others by their ends
    others = {name for name in shipped - shown if f"`_{name.rpartition('_')[2]}`" in SECTION}
    assert shown | others == shipped and all(name.endswith("gb") for name in others)
    for name, size in rows:
        recipe = load_recipe(f"dedistill:{name}")
        family = get_family(recipe.model.family)
        denoiser = family.full_size(recipe.model).denoiser
        targets = resolve_targets(recipe.adapter, adaptable(denoiser), family.presets(denoiser))
        assert round(count_parameters(targets, recipe.adapter.kind) / 1e6) == int(size), name
