"""Recipes from files: what is refused and in which words, extends, --set, and the way back to TOML."""

import random
import re

import pytest

from dedistill.errors import UserError
from dedistill.recipe import Recipe, RecipeError, load_recipe, to_toml

SMALL = """\
[run]
name = "x"
out = "runs/x"
[model]
family = "any"
path = "weights"
[data]
source = "digits"
[train]
steps = 10
batch = 8
lr = 1e-3
"""

# Between them the three say every key of the schema (tested below).
NEW = """\
[run]
name = "full"
out = "runs/full"
seed = 3
resume = "never"

[model]
family = "any"
mask = "none"
text_length = 9

[model.new]
channels = 3
height = 8
width = 16
patch = 4
layers = 2
single_layers = 2
heads = 4
head_dim = 16
rope_axes = [4, 6, 6]
text_dim = 8
pooled_dim = 8

[base]
quant = "int8"
exclude = ["*.norm"]

[adapter]
kind = "lokr"
init = "perturbed_normal"
init_scale = 1e-3

[[adapter.targets]]
preset = "mlp"
factor = -1
[[adapter.targets]]
pattern = "**.to_q"
rank = "full"

[data]
source = "pairs"
path = "pairs"
caption_noise = 0.0
caption_dropout = 0.0

[timesteps]
density = "beta"
alpha = 2.0
beta = 2
shift = "auto"
stratify = false

[train]
objective = "reflow"
steps = 100
batch = 8
micro_batch = 4
lr = 1e-4
schedule = "cosine"
warmup = 10
lr_floor = 0.1
optimizer = "adamw_bf16"
betas = [0.9, 0.99]
weight_decay = 0.01
max_grad_norm = 1
precision = "bf16"
gradient_checkpointing = true

[validate]
every = 10
samples = 64

[checkpoint]
every = 10
keep = 3

[snapshot]
every = 5

[log]
every = 2
sigma_bins = 4
wandb = true

[sample]
steps = 4
"""
TRAINED = re.sub(r"\[model\.new\].*?\n\n", 'path = "w"\n\n', NEW, flags=re.DOTALL).replace(
    'density = "beta"\nalpha = 2.0\nbeta = 2\n', 'density = "logit_normal"\nmean = 0.5\nstd = 1.0\n'
)
MODE = NEW.replace('density = "beta"\nalpha = 2.0\nbeta = 2\n', 'density = "mode"\nscale = -0.5\n')


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a text as ``x.toml``, so that messages start with that name."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> Recipe:
        (tmp_path / "x.toml").write_bytes(text.encode())
        return load_recipe("x.toml", overrides)

    return load


def errors_of(load, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    assert str(caught.value) == "\n".join(caught.value.errors)
    assert all("\n" not in line for line in caught.value.errors)
    return caught.value.errors


def test_a_good_recipe(load):
    recipe = load(NEW)
    assert recipe.train.lr == 1e-4 and recipe.adapter.targets[1].rank == "full" and recipe.validate_.samples == 64
    assert recipe.timesteps.beta == 2.0 and isinstance(recipe.timesteps.beta, float)  # an integer does for a number
    assert load(SMALL).train.betas == [0.9, 0.99]  # a default


def test_where(load):
    recipe = load(NEW, "train.lr=1e-5")
    line = NEW.split("\n").index('pattern = "**.to_q"') + 1
    assert recipe.where("adapter.targets.1.pattern") == f"x.toml:{line}: adapter.targets.1.pattern"
    assert recipe.where("adapter.targets.1.factor") == f"x.toml:{line - 1}: adapter.targets.1.factor"  # not set: its header
    assert recipe.where("train.lr") == "--set: train.lr"


LINES = SMALL.count("\n")
ONE_LINE_ERRORS = [  # what is added to SMALL, and the one message
    ("[timesteps]\nshfit = 3.0", f"x.toml:{LINES + 2}: timesteps.shfit: unknown key, did you mean 'shift'?"),
    (
        "[timesteps]\ndensity = 'logitnormal'",
        f"x.toml:{LINES + 2}: timesteps.density: 'logitnormal' is not one of "
        "'uniform', 'logit_normal', 'beta', 'mode', 'cosmap'; did you mean 'logit_normal'?",
    ),
    ("precision = 16", f"x.toml:{LINES + 1}: train.precision: expects 'fp32' or 'bf16', got the integer 16"),
    ("precision = 'x'", f"x.toml:{LINES + 1}: train.precision: 'x' is not one of 'fp32', 'bf16'"),
    ("warmup = '8'", f"x.toml:{LINES + 1}: train.warmup: expects an integer, got the string '8'"),
    ("warmup = 8.0", f"x.toml:{LINES + 1}: train.warmup: expects an integer, got the number 8.0"),
    ("warmup = true", f"x.toml:{LINES + 1}: train.warmup: expects an integer, got true"),
    ("warmup = 1979-05-27", f"x.toml:{LINES + 1}: train.warmup: expects an integer, got the date or time 1979-05-27"),
    ("warmup = -1", f"x.toml:{LINES + 1}: train.warmup: must be at least 0, got -1"),
    ("micro_batch = 0", f"x.toml:{LINES + 1}: train.micro_batch: must be at least 1, got 0"),
    ("lr_floor = 1.5", f"x.toml:{LINES + 1}: train.lr_floor: must be at most 1, got 1.5"),
    ("max_grad_norm = 0", f"x.toml:{LINES + 1}: train.max_grad_norm: must be more than 0, got 0"),
    ("max_grad_norm = nan", f"x.toml:{LINES + 1}: train.max_grad_norm: must be a finite number, got nan"),
    ("max_grad_norm = -inf", f"x.toml:{LINES + 1}: train.max_grad_norm: must be a finite number, got -inf"),
    ("max_grad_norm = true", f"x.toml:{LINES + 1}: train.max_grad_norm: expects a number, got true"),
    (f"warmup = -{10**30}", f"x.toml:{LINES + 1}: train.warmup: must be at least 0, got a number of more than 20 digits"),
    (
        f"max_grad_norm = 0x{'f' * 5000}",
        f"x.toml:{LINES + 1}: train.max_grad_norm: expects a number, got a number of more than 20 digits",
    ),
    ("betas = [0.9]", f"x.toml:{LINES + 1}: train.betas: must have at least 2 entries, got 1"),
    ("betas = [0.9, 0.9, 0.9]", f"x.toml:{LINES + 1}: train.betas: must have at most 2 entries, got 3"),
    ("betas = [0.9,\n 1.0]", f"x.toml:{LINES + 2}: train.betas.1: must be less than 1, got 1.0"),
    ("betas = 0.9", f"x.toml:{LINES + 1}: train.betas: expects an array, got the number 0.9"),
    ("gradient_checkpointing = 1", f"x.toml:{LINES + 1}: train.gradient_checkpointing: expects true or false, got the integer 1"),
    ("[timesteps]\nshift = 'aut'", f"x.toml:{LINES + 2}: timesteps.shift: expects a number or 'auto', got the string 'aut'; "
     "did you mean 'auto'?"),
    ("[timesteps]\nshift = 0", f"x.toml:{LINES + 2}: timesteps.shift: must be more than 0 or 'auto', got 0"),
    ("[timesteps]\nshift = inf", f"x.toml:{LINES + 2}: timesteps.shift: must be a finite number or 'auto', got inf"),
    ("[timesteps]\nshift = [1]", f"x.toml:{LINES + 2}: timesteps.shift: expects a number or 'auto', got an array"),
    (
        "[adapter]\nkind = 'lora'\n[[adapter.targets]]\npreset = 'mlp'\nrank = true",
        f"x.toml:{LINES + 5}: adapter.targets.0.rank: expects an integer or 'full', got true",
    ),
    (
        "[adapter]\nkind = 'lora'\n[[adapter.targets]]\npatern = 'mlp'",
        f"x.toml:{LINES + 4}: adapter.targets.0.patern: unknown key, did you mean 'pattern'?",
    ),
    ("[adapter]\nkind = 'lora'\ntargets = []", f"x.toml:{LINES + 3}: adapter.targets: must have at least 1 entry, got 0"),
    (
        "[adapter]\nkind = 'lora'\n[adapter.targets]\npreset = 'mlp'",
        f"x.toml:{LINES + 3}: adapter.targets: expects an array, got a table; an array of tables is written [[adapter.targets]]",
    ),
    ("[adapter]\nkind = 'lora'", f"x.toml:{LINES + 1}: adapter.targets: required, not set"),
    ("[[log]]\nevery = 2", f"x.toml:{LINES + 1}: log: expects a table, got an array; a single table is written [log]"),
    ("[validte]\nevery = 2", f"x.toml:{LINES + 1}: validte: unknown table, did you mean 'validate'?"),
    ("[validate_]\nevery = 2", f"x.toml:{LINES + 1}: validate_: unknown table, did you mean 'validate'?"),
    ("[log]\nlr = 2", f"x.toml:{LINES + 2}: log.lr: unknown key, did you mean 'train.lr'?"),
    ("seed = 1", f"x.toml:{LINES + 1}: train.seed: unknown key, did you mean 'run.seed'?"),
    (
        "[checkpoint]\nsteps = 1",
        f"x.toml:{LINES + 2}: checkpoint.steps: unknown key, did you mean 'train.steps' or 'sample.steps'?",
    ),
    ("[snapshot]\nzzz = 1", f"x.toml:{LINES + 2}: snapshot.zzz: unknown key, known here: every"),
    ('"a.b\\n" = 1', f'x.toml:{LINES + 1}: train."a.b\\n": unknown key, known here: objective, steps, batch, micro_batch, lr, '
     "schedule, warmup, lr_floor, optimizer, betas, weight_decay, max_grad_norm, precision, gradient_checkpointing"),
    ("[log]\nwandb = 0", f"x.toml:{LINES + 2}: log.wandb: expects true or false, got the integer 0"),
    ("warmup = 10", f"x.toml:{LINES + 1}: train.warmup: 10 leaves no step of the 10 at the full rate"),
    ("[base]\nquant = 'int8'", f"x.toml:{LINES + 2}: base.quant: a quantized base is frozen: add an [adapter] table or set "
     "quant = 'none'"),
]  # fmt: skip


@pytest.mark.parametrize(("added", "message"), ONE_LINE_ERRORS, ids=lambda v: v.split("\n")[-1][:30])
def test_one_mistake_one_line(load, added, message):
    assert errors_of(load, SMALL + added) == [message]


def test_all_mistakes_at_once_in_the_order_of_lines(load):
    text = """\
[train]
batch = "8"
stpes = 10
[timesteps]
density = "logitnormal"
shfit = "none"
[run]
out = ""
[[adapter.targets]]
rank = 0
"""
    assert errors_of(load, text, "log.evry=2") == [
        "x.toml: model.family: required, not set",
        "x.toml: data.source: required, not set",
        "x.toml:1: train.lr: required, not set",
        "x.toml:2: train.batch: expects an integer, got the string '8'",
        "x.toml:3: train.stpes: unknown key, did you mean 'steps'?",
        "x.toml:5: timesteps.density: 'logitnormal' is not one of 'uniform', 'logit_normal', 'beta', 'mode', 'cosmap'; "
        "did you mean 'logit_normal'?",
        "x.toml:6: timesteps.shfit: unknown key, did you mean 'shift'?",
        "x.toml:6: timesteps.shift: expects a number or 'auto', got the string 'none'",
        "x.toml:7: run.name: required, not set",
        "x.toml:8: run.out: must not be empty, got ''",
        "x.toml:9: adapter.kind: required, not set",
        "x.toml:10: adapter.targets.0.rank: must be at least 1 or 'full', got 0",
        "--set: log.evry: unknown key, did you mean 'every'?",
    ]


def test_contradictions_come_with_misspellings(load):
    assert errors_of(load, SMALL + "lr_floor = 0.1\nshedule = 'constant'\n") == [
        f"x.toml:{LINES + 1}: train.lr_floor: has no effect with schedule = 'constant'",
        f"x.toml:{LINES + 2}: train.shedule: unknown key, did you mean 'schedule'?",
    ]


def test_no_contradiction_is_made_up_for_a_key_that_was_not_understood(load):
    """Without the unknown key the model has neither path nor new; that is no second mistake."""
    text = SMALL.replace("path = ", "zzz = ")
    assert errors_of(load, text) == ["x.toml:6: model.zzz: unknown key, known here: family, path, mask, text_length, new"]


@pytest.mark.parametrize("key", ["api_key", "apikey", "hf_token", "HF_TOKEN", "password", "client-secret", "wandb_api_key"])
@pytest.mark.parametrize("place", ["file", "--set", "inline"])
def test_secrets_are_refused_and_not_shown(load, key, place):
    advice = "looks like a secret, and recipes are copied and shared; set an environment variable instead"
    if place == "file":
        errors = errors_of(load, SMALL + f'{key} = "xyz123"\n')
        assert errors == [f"x.toml:{LINES + 1}: train.{key}: {advice}"]
    elif place == "--set":
        assert errors_of(load, SMALL, f"train.{key}=xyz123") == [f"--set: train.{key}: {advice}"]
    else:
        errors = errors_of(load, SMALL, f'zzz={{{key} = "xyz123"}}')
        assert len(errors) == 2 and f"--set: zzz.{key}: {advice}" in errors and "xyz123" not in str(errors)


@pytest.mark.parametrize("key", ["text_length", "tokenizer", "max_tokens", "secretary"])
def test_other_words_are_no_secrets(load, key):
    assert all("secret," not in line for line in errors_of(load, SMALL + f"{key} = 1\n"))


# --- files ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\nb = \n", "x.toml:2: not valid TOML: invalid value"),
        (b"a = 1\na = 2\n", "x.toml:2: not valid TOML: cannot overwrite a value"),
        (b"a = [1,\n\n", "x.toml:3: not valid TOML: invalid value"),
        (b"[a]\r\n[a]\r\n", "x.toml:2: not valid TOML: cannot declare ('a',) twice"),
        (b"a = '\xff'", "x.toml: not a text file in UTF-8 (byte 5)"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "x.toml: nested too deeply"),
        (b"\nextend = 'base.toml'\n", "x.toml:2: extend: unknown key, did you mean 'extends'?"),
        (b"extends = 3\n", "x.toml:1: extends: expects a string, the path of another recipe, got the integer 3"),
        (b"extends = 'no.toml'\n", "x.toml:1: extends: no.toml: no such file"),
        (b"\nextends = '.'\n", "x.toml:2: extends: .: a folder, not a recipe"),
        (b'extends = "a\\u0000"\n', "x.toml:1: extends: a\\x00: embedded null byte"),
        (b"extends = 'x.toml'\n", "x.toml:1: extends: leads round in a circle: x.toml -> x.toml"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.toml")
    assert [line.replace("\0", "\\x00") for line in caught.value.errors] == [message]


def test_no_file_at_all(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: no such file$") as caught:
        load_recipe(tmp_path / "none.toml")
    assert caught.value.exit_code == 2
    with pytest.raises(RecipeError, match="a folder, not a recipe$"):
        load_recipe(tmp_path)


def test_byte_order_mark_and_windows_line_ends(load):
    assert load("\ufeff" + SMALL.replace("\n", "\r\n")) == load(SMALL)


# --- extends ---


def test_extends_merges_tables_and_replaces_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.toml").write_text(NEW)
    (tmp_path / "deep" / "middle.toml").write_text('extends = "../base.toml"\n[train]\nlr = 5.0\nbatch = 16\n')
    (tmp_path / "deep" / "top.toml").write_text(
        'extends = "middle.toml"\n[train]\nlr = 6.0\n[model.new]\nwidth = 24\n[[adapter.targets]]\npreset = "attention"\n'
    )
    base, top = load_recipe("base.toml").resolved(), load_recipe("deep/top.toml")
    base["train"] |= {"lr": 6.0, "batch": 16}
    base["model"]["new"]["width"] = 24
    base["adapter"]["targets"] = [{"preset": "attention", "pattern": None, "factor": None, "rank": None}]
    assert top.resolved() == base
    assert top.where("train.lr") == "deep/top.toml:3: train.lr"
    assert top.where("train.batch") == "deep/middle.toml:4: train.batch"
    assert top.where("run.name") == "base.toml:2: run.name"
    assert top.where("adapter.targets.0.preset") == "deep/top.toml:7: adapter.targets.0.preset"
    assert "adapter.targets.1" not in top._places  # the base's second target is gone


def test_mistakes_of_both_files_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text(SMALL.replace("batch", "bacth"))
    (tmp_path / "x.toml").write_text('extends = "base.toml"\n[run]\nname = 3\n[log]\nevry = 1\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.toml")
    assert caught.value.errors == [
        "x.toml:3: run.name: expects a string, got the integer 3",
        "x.toml:5: log.evry: unknown key, did you mean 'every'?",
        "base.toml:11: train.bacth: unknown key, did you mean 'batch'?",
    ]


def test_extends_in_a_circle_or_broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('\nextends = "a.toml"\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe("a.toml")
    assert caught.value.errors == ["b.toml:2: extends: leads round in a circle: a.toml -> b.toml -> a.toml"]
    (tmp_path / "b.toml").write_text("\n=")
    with pytest.raises(RecipeError, match=r"^b\.toml:2: not valid TOML"):
        load_recipe("a.toml")


# --- overrides ---


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("run.name=foo", lambda r: r.run.name == "foo"),
        ("run.name='3'", lambda r: r.run.name == "3"),
        ("run.name=a=b c", lambda r: r.run.name == "a=b c"),
        ("run.name=1\nb = 2", lambda r: r.run.name == "1\nb = 2"),
        (" train . lr = 1e-5 ", lambda r: r.train.lr == 1e-5),
        ("train.betas=[0.5, 0.6]", lambda r: r.train.betas == [0.5, 0.6]),
        ("train.betas.1=0.6", lambda r: r.train.betas == [0.9, 0.6]),
        ("adapter.targets.0.rank=4", lambda r: r.adapter.targets[0].rank == 4),
        ("adapter.targets=[{preset = 'x'}]", lambda r: [t.preset for t in r.adapter.targets] == ["x"]),
        ("timesteps={density = 'cosmap'}", lambda r: r.timesteps.density == "cosmap" and r.timesteps.alpha is None),
        ("log.wandb=false", lambda r: r.log.wandb is False),
    ],
)
def test_overrides(load, override, read):
    assert not read(load(NEW))
    assert read(load(NEW, override))


def test_overrides_may_open_a_table_and_the_last_one_wins(load):
    recipe = load(SMALL, "validate.every=5", "validate.every=7")
    assert recipe.validate_.every == 7 and recipe.where("validate.every") == "--set: validate.every"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", "--set: 'foo': expects table.key=value"),
        ("=3", "--set: '=3': expects table.key=value"),
        ("train..lr=3", "--set: 'train..lr=3': expects table.key=value"),
        ("train.lr=x", "--set: train.lr: expects a number, got the string 'x'"),
        ("train.lr=nan", "--set: train.lr: must be a finite number, got nan"),
        ("run.name=", "--set: run.name: must not be empty, got ''"),
        ("train.lrr=1", "--set: train.lrr: unknown key, did you mean 'lr'?"),
        ("trian.lr=1", "--set: trian: unknown table, did you mean 'train'?"),
        ("lr=1", "--set: lr: unknown key, did you mean 'train.lr'?"),
        ("log=3", "--set: log: expects a table, got the integer 3"),
        ("train.lr.x=1", "--set: train.lr.x: 'train.lr' is the number 0.0001, not a table"),
        ("adapter.targets.2.rank=4", "--set: adapter.targets.2.rank: 'adapter.targets' has 2 entries, numbered from 0"),
        ("adapter.targets.x.rank=4", "--set: adapter.targets.x.rank: 'adapter.targets' has 2 entries, numbered from 0"),
        ("zzz.0.rank=4", "--set: zzz.0.rank: 'zzz' is not set, so it has no entry 0"),
        ("extends=base.toml", "--set: extends: can only be said in a file"),
        ("train.lr_floor=[[[[", "--set: train.lr_floor: expects a number, got the string '[[[['"),
        ("adapter.targets.0={presets = 'x'}", "--set: adapter.targets.0.presets: unknown key, did you mean 'preset'?"),
        ("timesteps={density = 'mode', alpha = 1}", "--set: timesteps.alpha: has no effect with density = 'mode'; needs 'beta'"),
    ],
)
def test_wrong_overrides(load, override, message):
    assert errors_of(load, NEW, override) == [message]
