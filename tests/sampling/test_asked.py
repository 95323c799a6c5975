"""A recipe's own way of sampling is what previews, meters, sweeps and pairs use, and what they say they used."""

import json

import pytest
from PIL import Image
from tiny_recipes import TEACHER

from dedistill.cli.main import main

OWN = "UniPC, APG eta 0.5 rms inf momentum -0.5"
SETTINGS = ["train.steps=1", "preview.every=1", "preview.prompts=['3 seven']", "preview.cfgs=[3.0]", "meters.every=1"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Runs of one step of the same seed, as usual and otherwise: recipe, run directory."""
    folder, found = tmp_path_factory.mktemp("asked"), {}
    for name, how in (("usual", ""), ("other", 'solver = "unipc"\nguider = "apg:eta=0.5"')):
        recipe = folder / f"{name}.toml"
        recipe.write_text(TEACHER.format(out=folder / name, steps=1) + f"[sample]\nsteps = 4\n{how}\n")
        assert main(["train", str(recipe), *(word for s in SETTINGS for word in ("--set", s))]) == 0
        found[name] = recipe, folder / name / "teacher"
    return found


def test_previews_and_meters_use_it(asked):
    """Of the same weights: other images, which say so, and other meters of paths."""
    images, meters = [], []
    for _, run in asked.values():
        with Image.open(run / "previews/step-00000000/p000_cfg3.png") as image:
            images.append((image.tobytes(), image.text.get("method")))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        meters.append(next(row for row in rows if "few_step_gap" in row))
    (plain, nothing), (other, method) = images
    assert plain != other and (nothing, method) == (None, OWN)
    assert meters[0]["few_step_gap"] != meters[1]["few_step_gap"] and meters[0]["guidance_gap"] == meters[1]["guidance_gap"]


@pytest.mark.slow
def test_a_sweep_uses_each_recipe_s_own_or_the_one_it_is_told(asked, tmp_path):
    recipes = [str(recipe) for recipe, _ in asked.values()]
    common = ["--set", "run.name=a", "--prompts", "16", "--cfg", "3"]

    def cells(*words):
        for recipe in recipes:
            assert main(["sweep", recipe, *common, *words, "--out", str(tmp_path / str(len(found)))]) == 0
            scores = json.loads((tmp_path / str(len(found)) / "scores.json").read_text())
            found.append([(cell.get("method"), cell["nfe"]) for cell in scores["cells"]])
            said.append(scores["settings"]["solver"])

    found, said = [], []
    cells()
    cells("--solver", "heun", "dpmpp_2m", "--guider", "cfg")
    cells("--solver", "euler", "--guider", "cfg", "rescale", "zero_star", "--cfg", "1", "3")
    assert found[:2] == [[(None, 8)], [(OWN, 8)]] and said[:2] == ["Euler", "UniPC"]
    assert found[2] == found[3] == [("Heun", 14), ("DPM-Solver++(2M)", 8)]
    assert said[2] == "Heun, DPM-Solver++(2M)"
    assert found[4] == found[5] == [(None, 4), (None, 8), ("rescaled phi 0.7", 8), ("CFG-Zero* zero 1", 6)]
    page = (tmp_path / "5" / "index.html").read_text()
    assert "rescaled phi 0.7" in page and "CFG-Zero* zero 1" in page


def test_pairs_use_it_and_say_so(asked, tmp_path):
    recipe, _ = asked["other"]
    words = ["pairs", str(recipe), "--count", "2", "--steps", "4", "--points", "2"]
    for name, more in (("own", []), ("told", ["--solver", "heun", "--guider", "interval:low=0,high=0.5"])):
        assert main([*words, "--out", str(tmp_path / name), *more]) == 0
    told = [json.loads((tmp_path / name / "pairs.json").read_text()) for name in ("own", "told")]
    assert [(facts["solver"], facts["method"]) for facts in told] == [("unipc", OWN), ("heun", "Heun, interval low 0 high 0.5")]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("solver=ddim", "dpmpp_2m"),
        ("guider=apgg", "there are cfg, interval"),
        ("guider=apg:eta=7", "0 <= eta <= 1"),
        ("guider=auto", "an [adapter]"),
    ],
)
def test_what_there_is_not_is_refused_by_name(asked, capsys, setting, words):
    recipe, _ = asked["usual"]
    assert main(["plan", str(recipe), "--set", f"sample.{setting}"]) == 2
    assert "sample." + setting.partition("=")[0] in (said := capsys.readouterr().err) and words in said
    if setting.startswith("guider=apg"):
        with pytest.raises(SystemExit):
            main(["sweep", str(recipe), "--guider", setting.partition("=")[2]])
        assert words in capsys.readouterr().err


def test_blocks_that_the_network_has_not_are_told_before_it_trains(asked, capsys):
    recipe, _ = asked["usual"]
    for block, code in ((1, 0), (2, 2)):
        words = ["--set", f"sample.guider=skip_layers:blocks={block}", "--set", f"run.out={recipe.parent / str(block)}"]
        assert main(["train", str(recipe), *words]) == code
    assert "sample.guider: no block 2; the network has 2 blocks" in capsys.readouterr().err
