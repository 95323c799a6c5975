"""Keys that are well formed alone but make no sense together."""

from dedistill.recipe.model_tables import Adapter
from dedistill.recipe.objectives import OBJECTIVES
from dedistill.recipe.schema import Meters, Preview, Recipe, Timesteps


def contradictions(recipe: Recipe) -> list[tuple[str, str]]:
    """Keys that are well formed alone but make no sense together, as ``(dotted key, message)``."""
    found = _model_rules(recipe) + _data_rules(recipe) + _timestep_rules(recipe) + _training_rules(recipe)
    if recipe.adapter is not None:
        found += _adapter_rules(recipe.adapter)
    return found


def _model_rules(r: Recipe) -> list[tuple[str, str]]:
    found = []
    if (r.model.path is None) == (r.model.new is None):
        found.append(("model", "set exactly one of path (trained weights) and new (sizes of a new network)"))
    if new := r.model.new:
        if new.height % new.patch or new.width % new.patch:
            found.append(("model.new.patch", f"{new.patch} does not divide the image, {new.height} x {new.width}"))
        if sum(new.rope_axes) != new.head_dim:
            found.append(("model.new.rope_axes", f"they add up to {sum(new.rope_axes)}, head_dim is {new.head_dim}"))
    for key in ("revision", "components", "guidance"):
        if r.model.new and getattr(r.model, key) is not None:
            found.append((f"model.{key}", "has no effect on a new network; it belongs to trained weights"))
    if (r.sample.height is None) != (r.sample.width is None):
        found.append(("sample", "set both height and width, or neither"))
    if r.preview.every and not r.preview.prompts:
        found.append(("preview.prompts", "previews need at least one prompt"))
    if not r.preview.every and r.preview != Preview():
        found.append(("preview", "has no effect while preview.every is 0"))
    if not r.meters.every and r.meters != Meters():
        found.append(("meters", "has no effect while meters.every is 0"))
    if r.meters.every and OBJECTIVES[r.train.objective].own_sigmas:
        named = f"objective = '{r.train.objective}'"
        found.append(("meters.every", f"has no meaning with {named}, which knows the path at a few points only"))
    return found


_IMAGE_KEYS = (
    "cache",
    "resolutions",
    "crops",
    "crops_per_picture",
    "max_upscale",
    "missing_captions",
    "split_lines",
    "limit",
    "held_out",
)


def _data_rules(r: Recipe) -> list[tuple[str, str]]:
    found = []
    if r.data.source == "pictures":
        if not r.data.sets:
            found.append(("data.sets", "required with source = 'pictures': [[data.sets]] with a path"))
        if r.data.cache is None:
            found.append(("data.cache", "required with source = 'pictures': a folder for what is encoded once"))
        if r.data.path is not None:
            found.append(("data.path", "has no effect with source = 'pictures'; name places in [[data.sets]]"))
        if r.data.caption_noise:
            found.append(("data.caption_noise", "has no effect with source = 'pictures'"))
        if r.data.held_out == 0 and (r.validate_.every or r.meters.every):
            key = "validate" if r.validate_.every else "meters"
            found.append(("data.held_out", f"0 leaves nothing to validate on; raise it or set {key}.every = 0"))
    else:
        for key in ("sets", *_IMAGE_KEYS):
            if getattr(r.data, key) not in (None, []):
                found.append((f"data.{key}", f"has no effect with source = '{r.data.source}'; it belongs to 'pictures'"))
    if r.data.source == "pairs" and r.data.path is None:
        found.append(("data.path", "required with source = 'pairs': the folder that dedistill pairs wrote"))
    if r.data.source == "digits" and r.data.path is not None:
        found.append(("data.path", "has no effect with source = 'digits', which ships with scikit-learn"))
    if r.data.source == "pairs" and r.data.caption_dropout:
        found.append(("data.caption_dropout", "would pair the empty prompt with guided images; leave it out with 'pairs'"))
    if r.data.source == "pairs" and r.data.caption_noise:
        found.append(("data.caption_noise", "has no effect with source = 'pairs', whose captions are stored"))
    return found


_DENSITY_KEYS = {"beta": {"alpha", "beta"}, "logit_normal": {"mean", "std"}, "mode": {"scale"}}


def _timestep_rules(r: Recipe) -> list[tuple[str, str]]:
    found = []
    for density, keys in _DENSITY_KEYS.items():
        for key in sorted(keys):
            if getattr(r.timesteps, key) is not None and r.timesteps.density != density:
                found.append((f"timesteps.{key}", f"has no effect with density = '{r.timesteps.density}'; needs '{density}'"))
    if OBJECTIVES[r.train.objective].own_sigmas and r.timesteps != Timesteps():
        named = f"objective = '{r.train.objective}'"
        found.append(("timesteps", f"has no effect with {named}: sigma comes from the stored points"))
    return found


def _training_rules(r: Recipe) -> list[tuple[str, str]]:
    found = []
    t = r.train
    if t.micro_batch is not None and t.batch % t.micro_batch:
        found.append(("train.micro_batch", f"{t.micro_batch} does not divide batch = {t.batch}"))
    if t.exact and t.micro_batch is not None:
        found.append(("train.micro_batch", "has no effect with exact = true: samples go through one by one"))
    if t.warmup >= t.steps:
        found.append(("train.warmup", f"{t.warmup} leaves no step of the {t.steps} at the full rate"))
    if 0 < t.spike <= 1:
        found.append(
            ("train.spike", f"{t.spike:g} times the usual gradient norm is not a spike; use more than 1, or 0 for no limit")
        )
    if t.lr_floor is not None and t.schedule == "constant":
        found.append(("train.lr_floor", "has no effect with schedule = 'constant'"))
    if t.optimizer == "adamw_bf16" and t.betas[1] > 0.99:
        found.append(("train.betas", f"second beta {t.betas[1]} > 0.99 never lets a bf16 second moment fall; use 0.99"))
    if t.optimizer == "adamw_bf16" and r.adapter is None:
        found.append(("train.optimizer", "adamw_bf16 is for adapters; a whole network is trained in fp32 with 'adamw'"))
    if t.optimizer == "adamw_bf16" and t.precision == "fp32":
        found.append(("train.optimizer", "adamw_bf16 keeps parameters in bf16; set train.precision = 'bf16'"))
    if OBJECTIVES[t.objective].pairs != (r.data.source == "pairs"):
        found.append(("train.objective", f"'{t.objective}' does not go with data.source = '{r.data.source}'"))
    if r.adapter is None and r.base.quant != "none":
        found.append(("base.quant", "a quantized base is frozen: add an [adapter] table or set quant = 'none'"))
    if r.base.quant == "none" and r.base.exclude:
        found.append(("base.exclude", "has no effect with quant = 'none'"))
    if r.snapshot.ema and not r.snapshot.every:
        found.append(("snapshot.ema", "has no effect while snapshot.every is 0"))
    if r.snapshot.ema and r.snapshot.ema[0] == r.snapshot.ema[1]:
        found.append(("snapshot.ema", "the two widths are the same"))
    if r.validate_.samples is not None and not r.validate_.every:
        found.append(("validate.samples", "has no effect while validate.every is 0"))
    return found


def _adapter_rules(a: Adapter) -> list[tuple[str, str]]:
    found = []
    for i, target in enumerate(a.targets):
        key = f"adapter.targets.{i}"
        if (target.pattern is None) == (target.preset is None):
            found.append((key, "set exactly one of pattern and preset"))
        if a.kind == "lora" and target.factor is not None:
            found.append((f"{key}.factor", "belongs to kind = 'lokr'; LoRA has only a rank"))
        if a.kind == "lora" and target.rank == "full":
            found.append((f"{key}.rank", "'full' belongs to kind = 'lokr'; give LoRA a number"))
        if target.factor == 0:
            found.append((f"{key}.factor", "must be -1 or at least 1"))
    if a.init == "ones" and a.kind == "lora":
        found.append(("adapter.init", "'ones' is a LoKr start; LoRA knows 'default' and 'perturbed_normal'"))
    if a.init_scale is not None and a.init != "perturbed_normal":
        found.append(("adapter.init_scale", f"has no effect with init = '{a.init}'"))
    return found
