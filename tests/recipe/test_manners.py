"""Recipes as people write them: numbers, paths and words of other programs, and short recipes that extend long ones."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from full_recipes import SMALL

from dedistill.cli.main import main
from dedistill.recipe import RecipeError, load_recipe
from dedistill.recipe.fields import Table
from dedistill.recipe.foreign import KEYS, VALUES
from dedistill.recipe.schema import Recipe
from dedistill.recipe.toml import fields_of, table_in

SCHNELL = 'extends = "dedistill:flux_schnell_24gb"\n'
DOTTED = r"\b(?:{})\.[a-z_.]*[a-z]".format("|".join(fields_of(Recipe)))


@pytest.fixture
def child_errors(tmp_path, monkeypatch):
    """The lines of the error that a recipe extending a shipped one must give."""
    monkeypatch.chdir(tmp_path)

    def child_errors(text: str, *overrides: str) -> list[str]:
        Path("my.toml").write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe("my.toml", overrides)
        return caught.value.errors

    return child_errors


def annotation_of(key: str) -> object:
    """Type of the field behind a dotted key; KeyError for one that does not exist."""
    model: type[Table] | None = Recipe
    for part in key.split("."):
        field = fields_of(model)[part]
        model = table_in(field.annotation)
    return field.annotation


@pytest.mark.parametrize(("text", "number"), [("1e4", 10_000), ("10000.0", 10_000), ("2E3", 2000), ("12", 12)])
def test_integers_may_be_written_as_numbers(load, text, number):
    recipe = load(SMALL.replace("steps = 10", f"steps = {text}"), "data.source=pictures", "data.sets=[{path='x'}]",
                  "data.cache=c", "data.resolutions=[6.4e1, 128.0]")  # fmt: skip
    assert recipe.train.steps == number and type(recipe.train.steps) is int and recipe.data.resolutions == [64, 128]


@pytest.mark.parametrize("text", ["1.5e0", "1e-3", "10.5"])
def test_others_are_none(errors_of, text):
    (line,) = errors_of(SMALL, f"train.warmup={text}")
    assert line.startswith("--set: train.warmup: expects an integer, got the number")


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("warmup", '"1e4"', "expects an integer, got the string '1e4'; write it without quotes"),
        ("lr", '" 3e-5"', "expects a number, got the string ' 3e-5'; write it without quotes"),
        ("lr", '"fast"', "expects a number, got the string 'fast'"),
    ],
)
def test_numbers_in_quotes(errors_of, key, text, said):
    (line,) = errors_of(f"{SMALL}{key} = {text}\n" if key not in SMALL else SMALL, f"train.{key}={text}")
    assert line.endswith(said)


@pytest.mark.parametrize("path", [r"C:\Users\x\run", r"D:\data\photos", r"C:\new\table", r"E:\temp"])
def test_paths_of_windows(errors_of, load, path):
    """In double quotes a backslash begins an escape: an unknown one is no TOML, and a known one another path."""
    quoted = SMALL.replace('out = "', f'out = "{path}"  # "')
    (line,) = errors_of(quoted)
    assert re.match(r"x\.toml:3: ", line) and "with /" in line and "in single quotes" in line
    assert load(quoted.replace(f'"{path}"', f"'{path}'")).run.out == path


@pytest.mark.parametrize("name", ["two\nlines", "a\ttab", "bell\a"])
def test_a_folder_may_have_any_name_that_it_has(errors_of, load, tmp_path, name):
    """Where there is no such folder, it is more likely an escape than a name."""
    quoted = SMALL.replace('out = "', f'out = {json.dumps(f"{tmp_path}/{name}/run")}  # "')
    (line,) = errors_of(quoted)
    assert "no such folder exists" in line and name not in line
    (tmp_path / name).mkdir()
    assert load(quoted).run.out == f"{tmp_path}/{name}/run"


def test_answers_to_words_of_others_name_keys_that_exist():
    keys = set(KEYS) | {answer for answers in VALUES.values() for answer in answers}
    named = {key for answer in keys for key in re.findall(DOTTED, answer)}
    assert len(named) > 30 and not [a for a in KEYS if not re.search(DOTTED, a)]
    for key in named | set(VALUES):
        annotation_of(key)
    known = {name for model in tables() for name in fields_of(model)}
    words = " ".join(KEYS.values()).split()
    assert len(words) == len(set(words)) and not set(words) & known, "a key of ours is no word of others"


def tables(model: type[Table] = Recipe) -> list[type[Table]]:
    inner = [found for field in fields_of(model).values() if (found := table_in(field.annotation))]
    return [model, *(t for found in inner for t in tables(found))]


def test_answers_to_values_of_others_name_values_that_exist():
    for key, answers in VALUES.items():
        known = literals(annotation_of(key))
        for answer, values in answers.items():
            named = {a or b or c for a, b, c in re.findall(r"take '([^']*)'|or '([^']*)'|^'([^']*)'", answer)}
            assert (named or "leave" in answer or key == "train.lr") and named <= known and not known & set(values.split()), (
                answer
            )


def literals(annotation: object) -> set[object]:
    inner = get_args(annotation)
    return {a for a in inner if isinstance(a, str)}.union(*(literals(a) for a in inner if not isinstance(a, str)))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("data.repeats=10", "data.sets.weight"),
        ("data.sets.0.num_repeats=10", "data.sets.weight"),
        ("train.epochs=3", "train.steps, in steps"),
        ("train.num_train_epochs=3", "train.steps, in steps"),
        ("train.learning_rate=1e-4", "what others call so is train.lr"),
        ("learning-rate=1e-4", "train.lr"),
        ("adapter.network_dim=16", "adapter.targets.rank"),
        ("adapter.lora_alpha=16", "not needed: a LoRA's alpha"),
        ("train.resolution=512", "data.resolutions"),
        ("log.tensorboard=true", "log.wandb"),
        ("network={dim = 16}", "what others call so is adapter.kind and the rest of [adapter]"),
        ("train.min_snr_gamma=5", "what others call so is train.min_snr, of families that predict noise"),
        ("train.noise_offset=0.1", "not here: flow matching's loss, in which timesteps.density weighs"),
        ("model.low_vram=true", "what others call so is base.swap"),
        ("train.te_lr=1", "not here: text encoders stay as they are"),
        ("data.flip_aug=true", "not here: images are taken as they are, cut by data.crops"),
        ("data.trigger_word=sks", "not here: captions are taken as they are, but for data.caption_dropout"),
        ("train.gradient_accumulation_steps=4", "train.batch / train.micro_batch"),
        ("train.optimizer=prodigy", "nothing here finds its own rate: take 'adamw'"),
        ("train.optimizer=AdamW8bit", "'adamw_bf16' is the one that saves memory"),
        ("train.optimizer=AdamW8bit(betas=3)", "'adamw_bf16'"),
        ("train.schedule=cosine_with_restarts", "take 'cosine'"),
        ("base.quant=int4", "measured to cost quality (docs/tricks.md): take 'int8'"),
        ("train.lr=1", "must be at most 0.1, got 1; Prodigy's 1 is a factor"),
        ("train.lr=1.0", "usually 1e-5 to 1e-3"),
        ("train.lr=0.5", "must be at most 0.1, got 0.5"),
    ],
)
def test_words_of_others_are_answered_with_ours(child_errors, setting, says):
    (line,) = child_errors(SCHNELL, setting)
    assert line.startswith("--set: ") and says in line


CLASHES = [
    # lines of the child, the line that is blamed, what it says
    ("[train]\nsteps = 60", 3, "train.steps: does not go with train.warmup (dedistill:flux_schnell:59): 200 leaves no step of"),
    ("[train]\nsteps = 60", 3, "set train.warmup in my.toml too"),
    ('[adapter]\nkind = "lora"', 3, "adapter.kind: does not go with adapter.targets.0.factor (dedistill:flux_schnell_24gb:21)"),
    ('[adapter]\nkind = "lora"', 3, "set [[adapter.targets]] in my.toml too"),
    ("[train]\nmicro_batch = 3\nbatch = 32", 3, "train.micro_batch: 3 does not divide batch = 32"),
    ('[train]\nprecision = "fp32"', 3, "train.precision: does not go with train.optimizer (dedistill:flux_schnell:"),
    ("[data]\nheld_out = 0", 3, "data.held_out: 0 leaves nothing to validate on"),
]


@pytest.mark.parametrize(("text", "line", "says"), CLASHES)
def test_the_line_that_the_user_wrote_is_blamed(child_errors, text, line, says):
    found = child_errors(SCHNELL + text + "\n")
    assert all(error.startswith(f"my.toml:{line}: ") for error in found) and any(says in error for error in found), found


def test_settings_are_blamed_before_files(child_errors):
    (line,) = child_errors(SCHNELL + "[train]\nwarmup = 500\n", "train.steps=400")
    assert line == (
        "--set: train.steps: does not go with train.warmup (my.toml:3): 500 leaves no step of the 400 at the full rate; "
        "set train.warmup by --set too"
    )


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ('[timesteps]\ndensity = "logit_normal"', {"timesteps.alpha", "timesteps.beta"}),
        ("[preview]\nevery = 0", {"preview.prompts", "preview.cfgs", "preview.skip"}),
        ("[validate]\nevery = 0", {"validate.samples"}),
        ('[adapter]\ninit = "default"', {"adapter.init_scale"}),
        ("[train]\nexact = true", {"train.micro_batch"}),
    ],
)
def test_what_the_child_leaves_without_effect_goes(tmp_path, monkeypatch, text, gone):
    """It could not unset it, and is told. In one file, or said at once by --set, both stay a mistake."""
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(SCHNELL + text + "\n")
    base, found = load_recipe("dedistill:flux_schnell_24gb"), load_recipe("my.toml")
    noted = " ".join(found.notes)
    assert not base.notes and "my.toml:3" in noted and all(f"{key}" in noted for key in gone)
    assert {key for key in base._places if base.says(key) and not found.says(key)} >= gone
    header, _, setting = text.partition("\n")
    assert load_recipe("dedistill:flux_schnell_24gb", [f"{header.strip('[]')}.{setting}"]).train == found.train


def test_every_mistake_has_one_prefix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(SCHNELL + "[train]\nlr = 'x'\nstpes = 4\nwarmup = -1\n")
    assert main(["plan", "my.toml"]) == main(["check", "my.toml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and all(re.match(r"error: my\.toml:\d: train\.", line) for line in lines)


def test_a_rehearsal_blames_the_steps_that_were_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(SCHNELL + "[train]\nsteps = 300\n")
    assert main(["rehearse", "my.toml"]) == 2
    said = capsys.readouterr().err
    assert "error: my.toml:3: validate.every: 500 is never reached, nor is snapshot.every (1,000), nor is preview.every" in said
