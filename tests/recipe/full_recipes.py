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
