"""Recipes of tiny real runs, for tests."""

from dedistill.recipe.model_tables import Adapter
from dedistill.recipe.resolve import recipe_of


def adapter_table(kind: str, *targets: dict, **keys) -> Adapter:
    """A recipe's [adapter] table with every default in it."""
    return recipe_of(
        {
            "run": {"name": "a", "out": "a"},
            "model": {"family": "any", "path": "a"},
            "adapter": {"kind": kind, "targets": list(targets), **keys},
            "data": {"source": "digits"},
            "train": {"steps": 1, "batch": 1, "lr": 1e-3},
        }
    ).adapter


TEACHER = """
[run]
name = "tiny-teacher"
out = "{out}/teacher"
[model]
family = "pixel_flux"
mask = "none"
[model.new]
height = 8
width = 16
patch = 4
layers = 1
single_layers = 1
heads = 2
head_dim = 16
rope_axes = [4, 6, 6]
text_dim = 16
pooled_dim = 16
[data]
source = "digits"
caption_noise = 0.2
[train]
steps = {steps}
batch = 8
lr = 3e-3
"""

ADAPTER = """
[run]
name = "tiny-dedistill"
out = "{out}/dedistill"
[model]
family = "pixel_flux"
path = "{base}"
[base]
quant = "int8"
[adapter]
kind = "lokr"
init = "perturbed_normal"
[[adapter.targets]]
preset = "blocks"
factor = 4
[data]
source = "digits"
caption_noise = 0.2
[timesteps]
density = "beta"
[train]
steps = 6
batch = 8
lr = 1e-2
[validate]
every = 3
samples = 16
[checkpoint]
every = 2
[snapshot]
every = 2
"""

IMAGES = """
[run]
name = "tiny-images"
out = "{out}/run"
[model]
family = "flux"
path = "{base}"
text_length = 64
[adapter]
kind = "lora"
[[adapter.targets]]
preset = "attention"
rank = 2
[data]
source = "pictures"
cache = "{cache}"
resolutions = [64]
[[data.sets]]
path = "{images}"
[train]
steps = 2
batch = 4
lr = 1e-2
[checkpoint]
every = 1
[sample]
steps = 2
height = 64
width = 64
"""
