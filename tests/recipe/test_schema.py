"""The models: no two keys that exclude each other, the way back to TOML, every key, and the schema for editors."""

import json
import os
import random
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from full_recipes import FOLDS, IMAGES, MODE, NEW, SMALL, TRAINED

from dedistill.recipe import Recipe, RecipeError, load_recipe, to_toml
from dedistill.recipe.fields import Table
from dedistill.recipe.load import json_schema
from dedistill.recipe.rules import contradictions
from dedistill.recipe.shipped import CHAIN
from dedistill.recipe.toml import fields_of, table_in

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "dedistill" / "recipes" / "schema.json"
SHIPPED = sorted(f for f in (ROOT / "dedistill" / "recipes").rglob("*.toml") if f.name != CHAIN)
FULL = {"new": NEW, "trained": TRAINED, "mode": MODE, "images": IMAGES, "folds": FOLDS}


def leaves(model: type[Table] = Recipe, path: str = "") -> dict[str, str | None]:
    """Every key of the schema that is no table, without the numbers of arrays, and its description."""
    found = {}
    for name, field in fields_of(model).items():
        inner = table_in(field.annotation)
        found |= leaves(inner, f"{path}{name}.") if inner else {path + name: field.description}
    return found


def lines_of(text: str) -> list[tuple[int, str, str]]:
    """Line number, table and key of every key that stands on a line of its own."""
    found, table, rows = [], "", Counter()
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("[["):
            name = line.strip("[]")
            table = f"{name}.{rows[name]}"
            rows[name] += 1
        elif line.startswith("["):
            table = line.strip("[]")
        elif line:
            found.append((number, table, line.split(" = ")[0]))
    return found


def test_the_full_recipes_say_every_key():
    """So the tests below, which run over them, forget none."""
    said = {re.sub(r"\.\d+", "", f"{table}.{key}") for text in FULL.values() for _, table, key in lines_of(text)}
    assert said == set(leaves())


def test_every_key_is_described():
    assert [key for key, description in leaves().items() if not description] == []


@pytest.mark.parametrize("text", FULL.values(), ids=FULL)
@pytest.mark.parametrize("slip", ["double", "drop", "swap"])
def test_any_misspelt_key_gives_one_line(errors_of, text, slip):
    lines = text.split("\n")
    for number, table, key in lines_of(text):
        wrong = {"double": key[:2] + key[1:], "drop": key[:-1], "swap": key[1] + key[0] + key[2:]}[slip]
        changed = [*lines[: number - 1], lines[number - 1].replace(key, wrong, 1), *lines[number:]]
        errors = errors_of("\n".join(changed))
        assert len(errors) == 1, errors
        assert errors[0].startswith(f"x.toml:{number}: {table}.{wrong}: unknown key, did you mean '{key}'"), errors


@pytest.mark.parametrize("text", FULL.values(), ids=FULL)
def test_any_misspelt_table_gives_one_line(errors_of, text):
    headers = re.findall(r"^\[(\w+)\]$", text, flags=re.MULTILINE)
    assert len(headers) == len(Recipe.model_fields)
    for table in headers:
        wrong = table[:-1]
        changed = re.sub(rf"^(\[+){table}\b", rf"\1{wrong}", text, flags=re.MULTILINE)
        line = changed.split("\n").index(f"[{wrong}]") + 1
        assert errors_of(changed) == [f"x.toml:{line}: {wrong}: unknown table, did you mean '{table}'?"]


# --- contradictions ---

NEW_TABLE = "model.new={height = 8, width = 16, patch = 4, layers = 1, single_layers = 1, heads = 1, head_dim = 16, "
LORA = "adapter={kind = 'lora', targets = [{preset = 'mlp'%s}]%s}"
IMAGES_OF = ["data.source=pictures", "data.sets=[{path='x'}]", "data.cache=c"]
CONTRADICTIONS = [
    (
        [NEW_TABLE + "rope_axes = [4, 6, 6]}"],
        "model: set exactly one of path (trained weights) and new (sizes of a new network)",
    ),
    (["data.path=x"], "data.path: has no effect with source = 'digits', which ships with scikit-learn"),
    (["timesteps.alpha=1"], "timesteps.alpha: has no effect with density = 'uniform'; needs 'beta' or 'u_shaped'"),
    (["timesteps.std=1", "timesteps.density=mode"], "timesteps.std: has no effect with density = 'mode'; needs 'logit_normal'"),
    (["timesteps.scale=1"], "timesteps.scale: has no effect with density = 'uniform'; needs 'mode'"),
    (["train.micro_batch=3"], "train.micro_batch: 3 does not divide batch = 8"),
    (
        ["train.micro_batch=4", "train.exact=true"],
        "train.micro_batch: has no effect with exact = true: samples go through one by one",
    ),
    (["train.warmup=10"], "train.warmup: 10 leaves no step of the 10 at the full rate"),
    (["train.lr_floor=0.1"], "train.lr_floor: has no effect with schedule = 'constant'"),
    (
        ["train.spike=0.5"],
        "train.spike: 0.5 times the usual gradient norm is not a spike; use more than 1, or 0 for no limit",
    ),
    (
        ["train.optimizer=adamw_bf16", "train.precision=bf16"],
        "train.optimizer: adamw_bf16 is for adapters; a whole network is trained in fp32 with 'adamw'",
    ),
    (
        [LORA % ("", ""), "train.optimizer=adamw_bf16"],
        "train.optimizer: adamw_bf16 keeps parameters in bf16; set train.precision = 'bf16'",
    ),
    (
        [LORA % ("", ""), "train.optimizer=adamw_bf16", "train.precision=bf16", "train.betas=[0.9, 0.999]"],
        "train.betas: second beta 0.999 > 0.99 never lets a bf16 second moment fall; use 0.99",
    ),
    (
        ["train.objective=reflow"],
        "train.objective: 'reflow' does not go with data.source = 'digits'; data.pairs and online are for pairs beside images",
    ),
    (["train.scales=[1.0, 2.0]"], "train.scales: has no effect but with objective = 'guidance'"),
    (["train.objective=guidance", "train.scales=[3.0, 2.0]"], "train.scales: the lowest comes first, got [3.0, 2.0]"),
    (
        [
            LORA % ("", ""),
            "train.objective=features",
            "data={source = 'pairs', path = 'p'}",
            "train.gradient_checkpointing=true",
        ],
        "train.gradient_checkpointing: does not go with objective = 'features': blocks of the base would be computed again "
        "with the adapter",
    ),
    (["base.quant=int8"], "base.quant: a quantized base is frozen: add an [adapter] table or set quant = 'none'"),
    (["base.exclude=['*']"], "base.exclude: has no effect with quant = 'none'"),
    (["validate.samples=8"], "validate.samples: has no effect while validate.every is 0"),
    (["sample.height=64"], "sample: set both height and width, or neither"),
    (["preview.every=2"], "preview.prompts: previews need at least one prompt"),
    (["meters.steps=2"], "meters: has no effect while meters.every is 0"),
    (["preview.seed=2"], "preview: has no effect while preview.every is 0"),
    (["data.cache=c"], "data.cache: has no effect with source = 'digits'; it belongs to 'pictures'"),
    (["data.held_out=0"], "data.held_out: has no effect with source = 'digits'; it belongs to 'pictures'"),
    (["data.sets=[{path='x'}]"], "data.sets: has no effect with source = 'digits'; it belongs to 'pictures'"),
    (
        ["data.source=pictures", "data.cache=c"],
        "data.sets: required with source = 'pictures': [[data.sets]] with a path",
    ),
    (IMAGES_OF[:2], "data.cache: required with source = 'pictures': a folder for what is encoded once"),
    ([*IMAGES_OF, "data.path=x"], "data.path: has no effect with source = 'pictures'; name places in [[data.sets]]"),
    ([*IMAGES_OF, "data.caption_noise=0.1"], "data.caption_noise: has no effect with source = 'pictures'"),
    (
        [*IMAGES_OF, "data.held_out=0", "validate.every=1"],
        "data.held_out: 0 leaves nothing to validate on; raise it or set validate.every = 0",
    ),
    ([LORA % (", pattern = '*'", "")], "adapter.targets.0: set exactly one of pattern and preset"),
    ([LORA % (", factor = 4", "")], "adapter.targets.0.factor: belongs to kind = 'lokr'; LoRA has only a rank"),
    ([LORA % (", rank = 'full'", "")], "adapter.targets.0.rank: 'full' belongs to kind = 'lokr'; give LoRA a number"),
    ([(LORA % (", factor = 0", "")).replace("lora", "lokr")], "adapter.targets.0.factor: must be -1 or at least 1"),
    ([LORA % ("", ", init = 'ones'")], "adapter.init: 'ones' is a LoKr start; LoRA knows 'default' and 'perturbed_normal'"),
    ([LORA % ("", ", init_scale = 0.1")], "adapter.init_scale: has no effect with init = 'default'"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_keys_that_exclude_each_other(errors_of, overrides, message):
    place = "x.toml:4" if message.startswith("model:") else "x.toml:7" if ": required with" in message else "--set"
    assert errors_of(SMALL, *overrides) == [f"{place}: {message}"]


def test_a_contradiction_stands_at_the_line_of_its_table_or_file(errors_of):
    text = NEW.replace("rope_axes = [4, 6, 6]", "rope_axes = [4, 6, 8]").replace("patch = 4", "patch = 3")
    text = text.replace('path = "pairs"\n', "")
    number = {line: n for n, line in enumerate(text.split("\n"), 1)}
    assert errors_of(text) == [
        f"x.toml:{number['patch = 3']}: model.new.patch: 3 does not divide the image, 8 x 16",
        f"x.toml:{number['rope_axes = [4, 6, 8]']}: model.new.rope_axes: they add up to 18, head_dim is 16",
        f"x.toml:{number['[data]']}: data.path: required with source = 'pairs': the folder that dedistill pairs wrote",
    ]


# --- the way back ---


@pytest.mark.parametrize("text", [*FULL.values(), SMALL], ids=[*FULL, "small"])
def test_round_trip(load, text):
    recipe = load(text)
    printed = to_toml(recipe)
    assert load(printed) == recipe and to_toml(load(printed)) == printed
    assert recipe != load(text, "run.seed=99")


def test_round_trip_of_a_distillation(load):
    """Its time table has no effect and may not be set; printed with every default it must still be accepted."""
    recipe = load(
        NEW.split("[timesteps]")[0]
        + "[train]\nobjective = 'distill'\nsteps = 1\nbatch = 1\nlr = 1e-3\ngradient_checkpointing = true\n"
    )
    assert "[timesteps]" in to_toml(recipe) and load(to_toml(recipe)) == recipe


def test_round_trip_of_odd_values(load):
    text = "a\"b\\c\n\t\x00\x1f\x7f é 漢 \U0001f600 # [x] = '''"
    recipe = load(SMALL)
    recipe = recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"negative": text})})
    assert load(to_toml(recipe)).sample.negative == text
    for number in (1e-300, 5e-324, 1e22, 1e16, 0.1, 123456789.123):
        assert load(to_toml(load(SMALL, f"train.weight_decay={number!r}"))).train.weight_decay == number


def test_printed_recipe_says_every_default_and_leaves_out_what_has_no_effect(load):
    data = tomllib.loads(to_toml(load(SMALL)))
    assert data["train"]["betas"] == [0.9, 0.99] and data["log"] == {"every": 1, "sigma_bins": 8, "wandb": False}
    assert "lr_floor" not in data["train"] and data["data"]["caption_dropout"] == 0.1
    assert "adapter" not in data and "new" not in data["model"]


# --- the schema file and the shipped recipes ---


def make_schema(*args: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "tools/make_schema.py", *args], cwd=ROOT, env=env, capture_output=True, text=True)


def test_schema_file_is_up_to_date():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema(), "run: python tools/make_schema.py"
    assert make_schema("--check").returncode == 0


def test_schema_knows_the_same_keys_as_the_models():
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema" and schema["title"]

    def walk(node, path):
        if "items" in node:
            node = node["items"]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].removeprefix("#/$defs/")]
        if "properties" not in node:
            return {path}
        assert node["additionalProperties"] is False
        return {key for name, inner in node["properties"].items() for key in walk(inner, f"{path}.{name}" if path else name)}

    assert walk(schema, "") == {*leaves(), "extends"}
    assert '"type": "null"' not in json.dumps(schema)


def test_schema_asks_for_required_keys_only_of_whole_recipes():
    schema = json_schema()
    assert schema["if"] == {"not": {"required": ["extends"]}}
    assert schema["then"]["required"] == ["run", "model", "data", "train"]
    assert schema["then"]["properties"]["train"] == {"required": ["steps", "batch", "lr"]}
    assert "required" not in schema and not any("required" in table for table in schema["$defs"].values())


def check_shipped(path: Path, schema: Path = SCHEMA) -> None:
    """A recipe of ours loads, and its first line names the schema for editors."""
    load_recipe(path)
    first = path.read_text(encoding="utf-8").split("\n")[0]
    assert first == f"#:schema {Path(os.path.relpath(schema, path.parent)).as_posix()}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_recipes(path):
    check_shipped(path)


def test_the_check_of_shipped_recipes_can_fail(tmp_path):
    """And it passes on a good one, even where no recipe is shipped."""
    (tmp_path / "deep").mkdir()
    path, schema = tmp_path / "deep" / "x.toml", tmp_path / "schema.json"
    path.write_text("#:schema ../schema.json\n" + SMALL)
    check_shipped(path, schema)
    path.write_text("#:schema schema.json\n" + SMALL)
    with pytest.raises(AssertionError):
        check_shipped(path, schema)
    path.write_text("#:schema ../schema.json\n" + SMALL.replace("lr", "rate"))
    with pytest.raises(RecipeError):
        check_shipped(path, schema)


def mutate(text: str, rng: random.Random) -> str:
    """Text with one to three random changes of letters, lines, keys or values."""
    values = ["0", "-1", "1.5", "true", "'x'", "[]", "{}", "nan", "[[1]]", "{a = 1}", "1979-05-27", "9" * 400, "''", "[{}]"]
    signs = ["\n", "[", "]", "{", "}", "=", ",", ".", "#", '"', "'", '"""', "\\", "\x00", "é", "0", "a", " "]
    for _ in range(rng.randint(1, 3)):
        lines = text.split("\n")
        row, at = rng.randrange(len(lines)), rng.randint(0, len(text))
        match rng.randrange(6):
            case 0:
                text = text[:at] + rng.choice(signs) + text[at + rng.randint(0, 3) :]
            case 1:
                text = "\n".join(lines[:row] + lines[row + 1 :])
            case 2:
                text = "\n".join([*lines[:row], rng.choice(lines), *lines[row:]])
            case 3:
                lines[row], other = rng.choice(lines), lines[row]
                text = "\n".join([*lines, other])
            case _:
                lines[row] = f"{lines[row].split(' = ')[0] or 'zzz'} = {rng.choice(values)}"
                text = "\n".join(lines)
    return text


def test_random_changes_only_ever_raise_recipe_errors(load):
    rng = random.Random(0)
    loaded, refused, not_toml = 0, 0, 0
    for _ in range(400):
        text = mutate(rng.choice([*FULL.values(), SMALL]), rng)
        setting = f"{rng.choice(list(leaves()))}={rng.choice(['1', 'x', '[]', '{a = 1}', 'nan', ''])}"
        settings = [setting] if rng.random() < 0.3 else []
        try:
            recipe = load(text, *settings)
        except RecipeError as exc:
            refused += 1
            not_toml += "not valid TOML" in exc.errors[0]
            for line in exc.errors:
                assert re.match(r"(x\.toml(:\d+)?|--set): ", line) and "\n" not in line, line
                assert "Input should" not in line and "pydantic" not in line and "value in range" not in line, line
            assert len(set(exc.errors)) == len(exc.errors)
        else:
            loaded += 1
            assert contradictions(recipe) == [] and load(to_toml(recipe)) == recipe
    assert loaded > 5 and refused - not_toml > 100 and not_toml > 80
