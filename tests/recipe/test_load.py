"""What a recipe may not say, and in which words it is told so."""

import pytest
from full_recipes import NEW, SMALL


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
ONE_LINE_ERRORS = [  # what is added to SMALL, the line of the mistake below it, and the message
    ("[timesteps]\nshfit = 3.0", 2, "timesteps.shfit: unknown key, did you mean 'shift'?"),
    (
        "[timesteps]\ndensity = 'logitnormal'",
        2,
        "timesteps.density: 'logitnormal' is not one of 'uniform', 'logit_normal', 'beta', 'mode', 'cosmap', 'u_shaped'; "
        "did you mean 'logit_normal'?",
    ),
    ("precision = 16", 1, "train.precision: expects 'fp32' or 'bf16', got the integer 16"),
    ("precision = 'x'", 1, "train.precision: 'x' is not one of 'fp32', 'bf16'"),
    ("warmup = '8'", 1, "train.warmup: expects an integer, got the string '8'; write it without quotes"),
    ("warmup = 8.5", 1, "train.warmup: expects an integer, got the number 8.5"),
    ("warmup = inf", 1, "train.warmup: expects an integer, got the number inf"),
    ("warmup = -1.0", 1, "train.warmup: must be at least 0, got -1.0"),
    ("warmup = true", 1, "train.warmup: expects an integer, got true"),
    ("warmup = 1979-05-27", 1, "train.warmup: expects an integer, got the date or time 1979-05-27"),
    ("[sample]\nheight = 16_000_000", 2, "sample.height: must be at most 65536, got 16000000"),
    (
        "[preview]\nevery = 1\nprompts = ['a']\nseed = 1e23",
        4,
        "preview.seed: must be less than 9.22337203685478e+18, got 1e+23",
    ),
    ("warmup = -1", 1, "train.warmup: must be at least 0, got -1"),
    ("micro_batch = 0", 1, "train.micro_batch: must be at least 1, got 0"),
    ("lr_floor = 1.5", 1, "train.lr_floor: must be at most 1, got 1.5"),
    ("max_grad_norm = 0", 1, "train.max_grad_norm: must be more than 0, got 0"),
    ("max_grad_norm = nan", 1, "train.max_grad_norm: must be a finite number, got nan"),
    ("max_grad_norm = -inf", 1, "train.max_grad_norm: must be a finite number, got -inf"),
    ("max_grad_norm = true", 1, "train.max_grad_norm: expects a number, got true"),
    ("warmup = -1000000000000000000000000000000", 1, "train.warmup: must be at least 0, got a number of more than 20 digits"),
    (f"max_grad_norm = 0x{'f' * 5000}", 1, "train.max_grad_norm: expects a number, got a number of more than 20 digits"),
    ("betas = [0.9]", 1, "train.betas: must have at least 2 entries, got 1"),
    ("betas = [0.9, 0.9, 0.9]", 1, "train.betas: must have at most 2 entries, got 3"),
    ("betas = [0.9,\n 1.0]", 2, "train.betas.1: must be less than 1, got 1.0"),
    ("betas = 0.9", 1, "train.betas: expects an array, got the number 0.9"),
    (
        "gradient_checkpointing = 1.5",
        1,
        "train.gradient_checkpointing: expects true or false, an integer or 'auto', got the number 1.5",
    ),
    ("gradient_checkpointing = 0", 1, "train.gradient_checkpointing: must be at least 1 or 'auto', got 0"),
    (
        "[timesteps]\nshift = 'aut'",
        2,
        "timesteps.shift: expects a number or 'auto', got the string 'aut'; did you mean 'auto'?",
    ),
    ("[timesteps]\nshift = 0", 2, "timesteps.shift: must be more than 0 or 'auto', got 0"),
    ("[timesteps]\nshift = inf", 2, "timesteps.shift: must be a finite number or 'auto', got inf"),
    ("[timesteps]\nshift = [1]", 2, "timesteps.shift: expects a number or 'auto', got an array"),
    (
        "[adapter]\nkind = 'lora'\n[[adapter.targets]]\npreset = 'mlp'\nrank = true",
        5,
        "adapter.targets.0.rank: expects an integer or 'full', got true",
    ),
    (
        "[adapter]\nkind = 'lora'\n[[adapter.targets]]\npatern = 'mlp'",
        4,
        "adapter.targets.0.patern: unknown key, did you mean 'pattern'?",
    ),
    ("[adapter]\nkind = 'lora'\ntargets = []", 3, "adapter.targets: must have at least 1 entry, got 0"),
    (
        "[adapter]\nkind = 'lora'\n[adapter.targets]\npreset = 'mlp'",
        3,
        "adapter.targets: expects an array, got a table; an array of tables is written [[adapter.targets]]",
    ),
    ("[adapter]\nkind = 'lora'", 1, "adapter.targets: required, not set"),
    ("[[log]]\nevery = 2", 1, "log: expects a table, got an array; a single table is written [log]"),
    ("[validte]\nevery = 2", 1, "validte: unknown table, did you mean 'validate'?"),
    ("[validate_]\nevery = 2", 1, "validate_: unknown table, did you mean 'validate'?"),
    ("[log]\nlr = 2", 2, "log.lr: unknown key, did you mean 'train.lr'?"),
    ("seed = 1", 1, "train.seed: unknown key, did you mean 'run.seed' or 'preview.seed'?"),
    ("[sample]\nheight = 100\nwidth = 64", 2, "sample.height: must be a multiple of 16, got 100"),
    (
        "[checkpoint]\nsteps = 1",
        2,
        "checkpoint.steps: unknown key, did you mean 'train.steps', 'meters.steps', 'online.steps' or 'sample.steps'?",
    ),
    ("[snapshot]\nzzz = 1", 2, "snapshot.zzz: unknown key, known here: every, ema"),
    (
        '"a.b\\n" = 1',
        1,
        'train."a.b\\n": unknown key, known here: objective, scales, min_snr, huber, lpips, steps, batch, micro_batch, lr, '
        "schedule, warmup, lr_floor, optimizer, betas, weight_decay, max_grad_norm, spike, precision, exact, "
        "gradient_checkpointing, offload_activations, compile, attention",
    ),
    ("[log]\nwandb = 0", 2, "log.wandb: expects true or false, got the integer 0"),
    ("warmup = 10", 1, "train.warmup: 10 leaves no step of the 10 at the full rate"),
    ("[base]\nquant = 'int8'", 2, "base.quant: a quantized base is frozen: add an [adapter] table or set quant = 'none'"),
]


@pytest.mark.parametrize(("added", "line", "message"), ONE_LINE_ERRORS, ids=lambda v: str(v).split("\n")[-1][:30])
def test_one_mistake_one_line(errors_of, added, line, message):
    assert errors_of(SMALL + added) == [f"x.toml:{LINES + line}: {message}"]


def test_all_mistakes_at_once_in_the_order_of_lines(errors_of):
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
    assert errors_of(text, "log.evry=2") == [
        "x.toml: model.family: required, not set",
        "x.toml: data.source: required, not set",
        "x.toml:1: train.lr: required, not set",
        "x.toml:2: train.batch: expects an integer, got the string '8'; write it without quotes",
        "x.toml:3: train.stpes: unknown key, did you mean 'steps'?",
        "x.toml:5: timesteps.density: 'logitnormal' is not one of 'uniform', 'logit_normal', 'beta', 'mode', 'cosmap', "
        "'u_shaped'; did you mean 'logit_normal'?",
        "x.toml:6: timesteps.shfit: unknown key, did you mean 'shift'?",
        "x.toml:6: timesteps.shift: expects a number or 'auto', got the string 'none'",
        "x.toml:7: run.name: required, not set",
        "x.toml:8: run.out: must not be empty, got ''",
        "x.toml:9: adapter.kind: required, not set",
        "x.toml:10: adapter.targets.0.rank: must be at least 1 or 'full', got 0",
        "--set: log.evry: unknown key, did you mean 'every'?",
    ]


def test_contradictions_come_with_misspellings(errors_of):
    assert errors_of(SMALL + "lr_floor = 0.1\nshedule = 'constant'\n") == [
        f"x.toml:{LINES + 1}: train.lr_floor: has no effect with schedule = 'constant'",
        f"x.toml:{LINES + 2}: train.shedule: unknown key, did you mean 'schedule'?",
    ]


def test_no_contradiction_is_made_up_for_a_key_that_was_not_understood(errors_of):
    """Without the unknown key the model has neither path nor new; that is no second mistake."""
    text = SMALL.replace("path = ", "zzz = ")
    assert errors_of(text) == [
        "x.toml:6: model.zzz: unknown key, known here: family, path, revision, components, "
        "image_prompts, mask, t5_mask, null, prediction, guidance, text_length, new"
    ]


@pytest.mark.parametrize("key", ["api_key", "apikey", "hf_token", "HF_TOKEN", "password", "client-secret", "wandb_api_key"])
@pytest.mark.parametrize("place", ["file", "--set", "inline"])
def test_secrets_are_refused_and_not_shown(errors_of, key, place):
    advice = "looks like a secret, and recipes are copied and shared; set an environment variable instead"
    if place == "file":
        errors = errors_of(SMALL + f'{key} = "xyz123"\n')
        assert errors == [f"x.toml:{LINES + 1}: train.{key}: {advice}"]
    elif place == "--set":
        assert errors_of(SMALL, f"train.{key}=xyz123") == [f"--set: train.{key}: {advice}"]
    else:
        errors = errors_of(SMALL, f'zzz={{{key} = "xyz123"}}')
        assert len(errors) == 2 and f"--set: zzz.{key}: {advice}" in errors and "xyz123" not in str(errors)


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 12,
        "ghp_" + "x1" * 18,
        "github_pat_11ABCDEFG0" + "q_" * 20,
        "sk-proj-" + "Ab1" * 10,
        "AKIA" + "ABCD2345" * 2,
        "https://me:correcthorse@example.org/images",
    ],
)
@pytest.mark.parametrize("key", ["sample.negative", "model.path", "preview.prompts", "run.resume", "run.name"])
def test_secrets_are_refused_under_whatever_key(errors_of, key, secret):
    """And not shown, by other messages on the same value either."""
    value = f'["a", "see {secret}, b"]' if key == "preview.prompts" else f'"{secret}"'
    errors = errors_of(SMALL, f"{key}={value}")
    assert any(e.startswith(f"--set: {key}") and "looks like a secret" in e for e in errors), errors
    assert secret not in str(errors) and "correcthorse" not in str(errors)


@pytest.mark.parametrize(
    "value",
    [
        "data/hf_photos_of_my_cats_2024_06_a_long_name",
        "task-oriented-sketches-of-1234567890",
        "0123456789abcdef0123456789abcdef01234567",
        "https://example.org/a:b/c@d",
        "meet me at 12:30 @ the sk-8 park://x",
    ],
)
def test_other_values_are_no_secrets(load, value):
    assert load(SMALL, f'sample.negative="{value}"').sample.negative == value


@pytest.mark.parametrize("key", ["text_length", "tokenizer", "max_tokens", "secretary"])
def test_other_words_are_no_secrets(errors_of, key):
    assert all("secret," not in line for line in errors_of(SMALL + f"{key} = 1\n"))
