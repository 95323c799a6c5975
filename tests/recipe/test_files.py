"""Where a recipe comes from: files that cannot be read, extends, --set."""

import os

import pytest
from full_recipes import NEW, SMALL

from dedistill.errors import UserError
from dedistill.recipe import RecipeError, load_recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\nb = \n", "x.toml:2: not valid TOML: invalid value"),
        (b"a = 1\na = 2\n", "x.toml:2: not valid TOML: cannot overwrite a value"),
        (b"a = [1,\n\n", "x.toml:3: not valid TOML: invalid value"),
        (b"[a]\r\n[a]\r\n", "x.toml:2: not valid TOML: cannot declare ('a',) twice"),
        (b"a = '\xff'", "x.toml: not a text file in UTF-8 (byte 5)"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "x.toml: nested too deeply"),
        (b"\n" + b".".join([b"a"] * 20_000) + b" = 1", "x.toml: line 2: a key of more than 32 parts"),
        (b"x = 1\n[" + b" . ".join([b"b"] * 40) + b"]", "x.toml: line 2: a key of more than 32 parts"),
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
    with pytest.raises(RecipeError, match=r"a folder, not a recipe$"):
        load_recipe(tmp_path)


def test_dots_that_are_no_key_are_as_many_as_they_like(tmp_path):
    text = SMALL + "\n# " + "a." * 100 + "=\n[preview]\nevery = 1\nprompts = ['" + "so. " * 50 + "[x]=']\n"
    (tmp_path / "x.toml").write_text(text)
    assert load_recipe(tmp_path / "x.toml").preview.prompts == ["so. " * 50 + "[x]="]


def test_byte_order_mark_and_windows_line_ends(load):
    assert load("\ufeff" + SMALL.replace("\n", "\r\n")) == load(SMALL)


# --- extends ---


def test_extends_merges_tables_and_replaces_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.toml").write_text(NEW)
    (tmp_path / "deep" / "middle.toml").write_text('extends = "../base.toml"\n[train]\nlr = 0.05\nbatch = 16\n')
    (tmp_path / "deep" / "top.toml").write_text(
        'extends = "middle.toml"\n[train]\nlr = 0.06\n[model.new]\nwidth = 24\n[[adapter.targets]]\npreset = "attention"\n'
    )
    base, top = load_recipe("base.toml").resolved(), load_recipe("deep/top.toml")
    base["train"] |= {"lr": 0.06, "batch": 16}
    base["model"]["new"]["width"] = 24
    base["adapter"]["targets"] = [{"preset": "attention", "pattern": None, "factor": 4, "rank": "full"}]
    base["run"] |= {"name": "top", "out": "runs/top"}
    assert top.resolved() == base
    assert top.where("train.lr") == "deep/top.toml:3: train.lr"
    assert top.where("train.batch") == "deep/middle.toml:4: train.batch"
    assert top.where("run.name") == "deep/top.toml: run.name"
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


def test_paths_are_shown_short_and_circles_found_however_they_are_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "x.toml").write_text(SMALL.replace('[data]\nsource = "digits"\n', ""))
    with pytest.raises(RecipeError) as caught:
        load_recipe("deep/../x.toml")
    assert caught.value.errors == ["x.toml: data.source: required, not set"]
    (tmp_path / "x.toml").write_text("extends = 'deep/y.toml'\n")
    (tmp_path / "deep" / "y.toml").write_text("extends = '../x.toml'\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("x.toml")
    assert caught.value.errors == ["deep/y.toml:1: extends: leads round in a circle: x.toml -> deep/y.toml -> x.toml"]


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
        ("run.name=FLUX.1 a_b-c", lambda r: r.run.name == "FLUX.1 a_b-c"),
        ("run.name='3'", lambda r: r.run.name == "3"),
        ("run.out=a=b c", lambda r: r.run.out == "a=b c"),
        ("sample.negative=1\nb = 2", lambda r: r.sample.negative == "1\nb = 2"),
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


def test_an_override_of_a_table_leaves_nothing_of_the_old_one(load):
    recipe = load(NEW, "timesteps={density = 'cosmap'}")
    assert recipe.where("timesteps.alpha") == "--set: timesteps.alpha"
    assert recipe.where("timesteps.density") == "--set: timesteps.density"


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
        *[
            (
                f"run.name={name}",
                "--set: run.name: must begin with a letter or digit and hold only letters, digits, spaces and . _ -, "
                f"got '{name}'",
            )
            for name in ("../up", "a/b", ".hidden", "a:b", "été", "-rf")
        ],
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
        (
            "timesteps={density = 'mode', alpha = 1}",
            "--set: timesteps.alpha: has no effect with density = 'mode'; needs 'beta' or 'u_shaped'",
        ),
    ],
)
def test_wrong_overrides(errors_of, override, message):
    assert errors_of(NEW, override) == [message]


@pytest.mark.parametrize(
    ("table", "out"),
    [
        ("", "runs/mine"),
        ('[run]\nname = "cat"\n', "runs/mine"),
        ("[run]\nstuck_after = 500\n", "runs/mine"),
        ('[run]\nout = "a/b"\n', "a/b"),
    ],
)
def test_a_recipe_never_writes_into_the_run_of_the_one_it_extends(tmp_path, monkeypatch, table, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(f'extends = "dedistill:flux_lora"\n{table}')
    found, base = load_recipe("mine.toml"), load_recipe("dedistill:flux_lora")
    assert (found.run.out, found.run.name) == (out, "cat" if "cat" in table else base.run.name if "out" in table else "mine")
    assert (found.data.cache == base.data.cache) == ("out" in table)


@pytest.mark.parametrize(
    "data", ['source = "pairs"\npath = "p"\ncaption_dropout = 0.0\n[train]\nobjective = "reflow"\n', 'source = "digits"\n']
)
def test_a_recipe_that_trains_on_something_else_has_no_cache(tmp_path, data):
    timesteps = '[timesteps]\ndensity = "uniform"\nshift = 1.0\n'
    (tmp_path / "mine.toml").write_text(f'extends = "dedistill:flux_lora"\n{timesteps}[data]\n{data}')
    recipe = load_recipe(tmp_path / "mine.toml")
    assert recipe.data.cache is None and recipe.run.out == "runs/mine"


@pytest.mark.parametrize(
    ("text", "settings", "kept"),
    [
        ("", [], True),
        ('[model]\npath = "someone/else"\n', [], False),
        ("", ["model.path=someone/else"], False),
        ('[model]\npath = "someone/else"\nrevision = "REVISION"\n', [], True),
        ('[model]\nrevision = "REVISION"\n', [], True),
        ("", ["model.path=someone/else", "model.revision=REVISION"], True),
        ('[model]\npath = "someone/else"\nrevision = "REVISION"\n', ["model.path=a/third"], False),
    ],
)
def test_the_commit_of_one_model_is_not_anothers(tmp_path, monkeypatch, text, settings, kept):
    monkeypatch.chdir(tmp_path)
    commit = load_recipe("dedistill:flux_schnell_24gb").model.revision
    (tmp_path / "mine.toml").write_text(f'extends = "dedistill:flux_schnell_24gb"\n{text}'.replace("REVISION", "a" * 40))
    found = load_recipe("mine.toml", [s.replace("REVISION", "a" * 40) for s in settings]).model
    assert commit and (found.revision in (commit, "a" * 40)) == kept and (kept or found.revision is None)


@pytest.mark.parametrize("name", ["x.toml", "/dev/zero", "pipe"])
def test_only_small_regular_files_are_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "x.toml").write_bytes(b"# " + b"x" * (1 << 20))
    (tmp_path / "y.toml").write_text(f"extends = '{name}'\n")
    said = r"1,048,578 bytes, more than a recipe has" if name == "x.toml" else "not a regular file"
    for file in (name, "y.toml"):
        with pytest.raises(RecipeError, match=said):
            load_recipe(file)


@pytest.mark.parametrize("row", ["[t{}]\n", "k{} = 1\n"])
def test_recipes_have_a_bound_of_keys(load, row):
    with pytest.raises(RecipeError, match=r"x\.toml: 6,000 keys, more than a recipe has \(5,000\)"):
        load("".join(row.format(i) for i in range(6000)))


@pytest.mark.parametrize("key", ["log.sigma_bins", "train.batch", "sample.steps"])
def test_sizes_that_take_memory_have_bounds(errors_of, key):
    (line,) = errors_of(SMALL, f"{key}=2000000000")
    assert f"{key}: " in line and "at most 1" in line
