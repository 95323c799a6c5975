"""Recipes as text, for the tests of this folder."""

import re

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

# Between them they say every key of the schema (tested below).
NEW = """\
[run]
name = "full"
out = "runs/full"
seed = 3
resume = "never"
stuck_after = 60

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
matmul = "int8"
swap = 3

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
huber = 0.01
lpips = "lpips.safetensors"
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
spike = 30.0
precision = "bf16"
gradient_checkpointing = true
offload_activations = true
compile = "blocks"
attention = "cudnn"

[validate]
every = 10
samples = 64

[meters]
every = 10
samples = 8
steps = 8

[checkpoint]
every = 10
keep = 3

[snapshot]
every = 5
ema = [0.05, 0.1]

[log]
every = 2
sigma_bins = 4
wandb = true

[sample]
steps = 4
negative = "blurry"

[preview]
every = 5
prompts = ["a cat"]
cfgs = [1.0, 3.5]
skip = 1
seed = 2

[online]
every = 0
"""
STORED = 'source = "pairs"\npath = "pairs"\n'
TRAINED = re.sub(r"\[model\.new\].*?\n\n", 'path = "w"\n\n', NEW, flags=re.DOTALL).replace(
    'density = "beta"\nalpha = 2.0\nbeta = 2\n', 'density = "logit_normal"\nmean = 0.5\nstd = 1.0\n'
)
TRAINED = TRAINED.replace(STORED, 'source = "digits"\npairs = "pairs"\npairs_share = 0.25\n')
MODE = NEW.replace('density = "beta"\nalpha = 2.0\nbeta = 2\n', 'density = "mode"\nscale = -0.5\n')
MODE = MODE.replace(STORED, 'source = "digits"\npairs_share = 0.5\n')
MODE = MODE.replace("[online]\nevery = 0\n", "[online]\nevery = 5\npairs = 64\nkeep = 3\ncfg = 2.0\nsteps = 8\n")
MODE = MODE.replace("micro_batch = 4\n", "exact = true\n").replace('compile = "blocks"\nattention = "cudnn"\n', "")
IMAGES = re.sub(
    r"\[data\].*?\n\n",
    """\
[data]
source = "pictures"
cache = "cache"
resolutions = [512, 1024]
crops = ["aspect", "square"]
crops_per_picture = 2
max_upscale = 1.5
missing_captions = "quarantine"
split_lines = "never"
limit = 100
held_out = 0.05
caption_dropout = 0.1
image_dropout = 0.3

[[data.sets]]
path = "photos"
[[data.sets]]
path = "drawings.parquet"
name = "drawn"
weight = 0.5
captions = ["caption", "long_caption"]
file_column = "image"
split = "validation"

""",
    TRAINED,
    flags=re.DOTALL,
)
for old, new in (
    (
        'path = "w"\n',
        'path = "w/w"\nrevision = "0a1b"\ncomponents = "c/c"\nimage_prompts = "r/r"\n'
        't5_mask = false\nnull = "empty"\nprediction = "v"\nguidance = 1.0\n',
    ),
    ('"reflow"', '"flow"'),
    ('lpips = "lpips.safetensors"\n', ""),
    (
        "[sample]\nsteps = 4\n",
        "[sample]\nsolver = 'heun'\nguider = 'rescale:phi=0.5'\n"
        "steps = 4\nshift = 2.5\nheight = 512\nwidth = 768\nguidance = 3.5\n",
    ),
):
    IMAGES = IMAGES.replace(old, new)

FOLDS = IMAGES.replace("held_out = 0.05\n", "fold = [2, 5]\n")
FOLDS = re.sub(r"\[timesteps\].*?\n\n", '[timesteps]\ndensity = "uniform"\n\n', FOLDS, flags=re.DOTALL)
FOLDS = FOLDS.replace('objective = "flow"\n', 'objective = "diffusion"\nmin_snr = 5.0\n')
IMAGES = IMAGES.replace('objective = "flow"\n', 'objective = "guidance"\nscales = [1.0, 4.0]\n')
