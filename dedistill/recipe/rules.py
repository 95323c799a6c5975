"""Keys that are well formed alone but make no sense together."""

from typing import NamedTuple

from dedistill.flow.guidance import Autoguidance, guider_of
from dedistill.recipe.model_tables import Adapter
from dedistill.recipe.objectives import OBJECTIVES
from dedistill.recipe.schema import Meters, Online, Preview, Recipe, Timesteps


class Clash(NamedTuple):
    """A key that makes no sense with others; all dotted."""

    key: str
    message: str
    others: tuple[str, ...] = ()
    idle: bool = False
    """Nothing is wrong but that ``others`` leave the key without effect."""


def contradictions(recipe: Recipe) -> list[Clash]:
    """Keys that are well formed alone but make no sense together."""
    found = _model_rules(recipe) + _sampling_rules(recipe) + _data_rules(recipe) + _timestep_rules(recipe)
    found += _training_rules(recipe) + _optimizer_rules(recipe) + _swap_rules(recipe)
    if recipe.adapter is not None:
        found += _adapter_rules(recipe.adapter)
    return found


def _idle(key: str, message: str, *others: str) -> Clash:
    return Clash(key, message, others, idle=True)


def _clash(key: str, message: str, *others: str) -> Clash:
    return Clash(key, message, others)


def _model_rules(r: Recipe) -> list[Clash]:
    found = []
    if (r.model.path is None) == (r.model.new is None):
        found.append(_clash("model", "set exactly one of path (trained weights) and new (sizes of a new network)"))
    if new := r.model.new:
        if new.height % new.patch or new.width % new.patch:
            sides = "model.new.height", "model.new.width"
            found.append(
                _clash("model.new.patch", f"{new.patch} does not divide the image, {new.height} x {new.width}", *sides)
            )
        if sum(new.rope_axes) != new.head_dim:
            message = f"they add up to {sum(new.rope_axes)}, head_dim is {new.head_dim}"
            found.append(_clash("model.new.rope_axes", message, "model.new.head_dim"))
    for key in ("revision", "components", "guidance"):
        if r.model.new and getattr(r.model, key) is not None:
            found.append(_idle(f"model.{key}", "has no effect on a new network; it belongs to trained weights", "model.new"))
    return found


def _sampling_rules(r: Recipe) -> list[Clash]:
    found = []
    if (r.sample.height is None) != (r.sample.width is None):
        found.append(_clash("sample", "set both height and width, or neither"))
    found += _autoguidance_rules(r)
    if r.preview.every and not r.preview.prompts:
        found.append(_clash("preview.prompts", "previews need at least one prompt"))
    for key, table, plain in (("preview", r.preview, Preview()), ("meters", r.meters, Meters())):
        if not table.every and table != plain:
            found.append(_idle(key, f"has no effect while {key}.every is 0", f"{key}.every"))
    if r.meters.every and OBJECTIVES[r.train.objective].points:
        message = f"has no meaning with objective = '{r.train.objective}', which knows the path at a few points only"
        found.append(_clash("meters.every", message, "train.objective"))
    return found


def _autoguidance_rules(r: Recipe) -> list[Clash]:
    guider = guider_of(r.sample.guider)
    if not isinstance(guider, Autoguidance):
        return []
    if guider.step and r.preview.every:
        message = f"the snapshot of step {guider.step} is not there yet when previews begin; leave it to --guider of sweep"
        return [_clash("sample.guider", message, "preview.every")]
    if not guider.step and r.adapter is None:
        message = (
            "'auto' leads away from the base without its adapter, and here is none: add an [adapter] table, or name a step"
        )
        return [_clash("sample.guider", message)]
    return []


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
    "fold",
)


def _data_rules(r: Recipe) -> list[Clash]:
    source, found = "data.source", []
    if r.data.source == "pictures":
        if not r.data.sets:
            found.append(_clash("data.sets", "required with source = 'pictures': [[data.sets]] with a path"))
        if r.data.cache is None:
            found.append(_clash("data.cache", "required with source = 'pictures': a folder for what is encoded once"))
        if r.data.path is not None:
            message = "has no effect with source = 'pictures'; name places in [[data.sets]]"
            found.append(_idle("data.path", message, source))
        if r.data.caption_noise:
            found.append(_idle("data.caption_noise", "has no effect with source = 'pictures'", source))
        if r.data.held_out == 0 and (r.validate_.every or r.meters.every):
            key = "validate" if r.validate_.every else "meters"
            message = f"0 leaves nothing to validate on; raise it or set {key}.every = 0"
            found.append(_clash("data.held_out", message, f"{key}.every"))
    else:
        for key in ("sets", *_IMAGE_KEYS):
            if getattr(r.data, key) not in (None, []):
                message = f"has no effect with source = '{r.data.source}'; it belongs to 'pictures'"
                found.append(_idle(f"data.{key}", message, source))
    if r.data.image_dropout is not None and r.model.image_prompts is None:
        found.append(_idle("data.image_dropout", "has no effect without model.image_prompts", "model.image_prompts"))
    if r.data.fold and not (r.data.fold[0] <= r.data.fold[1] >= 2):
        message = f"[k, K] is the k-th of K parts, K at least 2 and k from 1 to K, got {r.data.fold}"
        found.append(_clash("data.fold", message))
    if r.data.fold and r.data.held_out not in (None, "auto"):
        found.append(_idle("data.held_out", "has no effect with data.fold, which holds out a part of its own", "data.fold"))
    if r.data.source == "pairs" and r.data.path is None:
        found.append(_clash("data.path", "required with source = 'pairs': the folder that dedistill pairs wrote"))
    if r.data.source == "digits" and r.data.path is not None:
        found.append(_idle("data.path", "has no effect with source = 'digits', which ships with scikit-learn", source))
    if r.data.source == "pairs" and r.data.caption_dropout:
        message = "would pair the empty prompt with guided images; leave it out with 'pairs'"
        found.append(_clash("data.caption_dropout", message, source))
    if r.data.source == "pairs" and r.data.caption_noise:
        found.append(_idle("data.caption_noise", "has no effect with source = 'pairs', whose captions are stored", source))
    return found


def _pairs_rules(r: Recipe) -> list[Clash]:
    objective = OBJECTIVES[r.train.objective]
    key = "online.every" if r.online.every else "data.pairs" if r.data.pairs is not None else ""
    if not key and objective.pairs != (r.data.source == "pairs"):
        both = "; data.pairs and online are for pairs beside images" if objective.mixes else ""
        message = f"'{r.train.objective}' does not go with data.source = '{r.data.source}'{both}"
        return [_clash("train.objective", message, "data.source")]
    if key and r.data.source == "pairs":
        message = "is for pairs beside images; with data.source = 'pairs' they are those of data.path"
        return [_clash(key, message, "data.source")]
    if key and not objective.mixes:
        able = " or ".join(f"'{name}'" for name, traits in OBJECTIVES.items() if traits.mixes)
        message = f"needs objective = {able}; '{r.train.objective}' does not train on both pairs and images"
        return [_clash(key, message, "train.objective")]
    if r.online.every and r.data.pairs is not None:
        return [_clash("data.pairs", "does not go with online.every, by which the run makes its own", "online.every")]
    if key and r.data.pairs_share is None:
        return [_clash("data.pairs_share", f"required with {key}: the share of samples that are of these")]
    found = []
    if not key and r.data.pairs_share is not None:
        found.append(_idle("data.pairs_share", "has no effect without data.pairs or online.every"))
    if not r.online.every and r.online != Online():
        found.append(_idle("online", "has no effect while online.every is 0", "online.every"))
    return found


_KEYS_OF_DENSITIES = {
    "alpha": ("beta", "u_shaped"),
    "beta": ("beta",),
    "mean": ("logit_normal",),
    "scale": ("mode",),
    "std": ("logit_normal",),
}


def _timestep_rules(r: Recipe) -> list[Clash]:
    if (origin := OBJECTIVES[r.train.objective].own_sigmas) and r.timesteps != Timesteps():
        message = f"has no effect with objective = '{r.train.objective}': sigma comes from {origin}"
        return [_idle("timesteps", message, "train.objective")]
    found = []
    for key, densities in _KEYS_OF_DENSITIES.items():
        if getattr(r.timesteps, key) is not None and r.timesteps.density not in densities:
            message = f"has no effect with density = '{r.timesteps.density}'; needs {' or '.join(map(repr, densities))}"
            found.append(_idle(f"timesteps.{key}", message, "timesteps.density"))
    return found


def _training_rules(r: Recipe) -> list[Clash]:
    found = []
    t = r.train
    if t.micro_batch is not None and t.batch % t.micro_batch:
        found.append(_clash("train.micro_batch", f"{t.micro_batch} does not divide batch = {t.batch}", "train.batch"))
    if t.exact and t.micro_batch is not None:
        message = "has no effect with exact = true: samples go through one by one"
        found.append(_idle("train.micro_batch", message, "train.exact"))
    if t.exact and t.compile != "none":
        message = "cannot keep what exact = true promises: which graph computes a batch depends on those seen before"
        found.append(_clash("train.compile", message, "train.exact"))
    if t.exact and t.attention != "torch":
        message = "cannot keep what exact = true promises: cuDNN sums gradients in another order each time"
        found.append(_clash("train.attention", message, "train.exact"))
    if t.offload_activations and not t.gradient_checkpointing:
        message = "has no effect without recomputation: set train.gradient_checkpointing"
        found.append(_idle("train.offload_activations", message, "train.gradient_checkpointing"))
    if t.warmup >= t.steps:
        message = f"{t.warmup} leaves no step of the {t.steps} at the full rate"
        found.append(_clash("train.warmup", message, "train.steps"))
    if 0 < t.spike <= 1:
        message = f"{t.spike:g} times the usual gradient norm is not a spike; use more than 1, or 0 for no limit"
        found.append(_clash("train.spike", message))
    if t.lr_floor is not None and t.schedule == "constant":
        found.append(_idle("train.lr_floor", "has no effect with schedule = 'constant'", "train.schedule"))
    if t.min_snr is not None and not OBJECTIVES[t.objective].diffusion:
        message = "has no effect but with a model's own loss: objective = 'diffusion' or 'rectified_diffusion'"
        found.append(_idle("train.min_snr", message, "train.objective"))
    if t.lpips is not None and not OBJECTIVES[t.objective].lpips:
        able = " or ".join(f"'{name}'" for name, traits in OBJECTIVES.items() if traits.lpips)
        message = f"has no effect but with objective = {able}"
        found.append(_idle("train.lpips", message, "train.objective"))
    if t.scales is not None and not OBJECTIVES[t.objective].fed:
        found.append(_idle("train.scales", "has no effect but with objective = 'guidance'", "train.objective"))
    if t.scales is not None and t.scales[0] > t.scales[1]:
        found.append(_clash("train.scales", f"the lowest comes first, got {t.scales}"))
    if t.objective == "features" and r.adapter is not None and t.gradient_checkpointing:
        message = "does not go with objective = 'features': blocks of the base would be computed again with the adapter"
        found.append(_clash("train.gradient_checkpointing", message, "train.objective"))
    found += _pairs_rules(r)
    if (codes := r.base.matmul) not in ("float", r.base.quant):
        message = f"'{codes}' multiplies codes: set base.quant = '{codes}', or matmul = 'float'"
        found.append(_clash("base.matmul", message, "base.quant"))
    if r.base.quant == "none" and r.base.exclude:
        found.append(_idle("base.exclude", "has no effect with quant = 'none'", "base.quant"))
    if r.snapshot.ema and not r.snapshot.every:
        found.append(_idle("snapshot.ema", "has no effect while snapshot.every is 0", "snapshot.every"))
    if r.snapshot.ema and r.snapshot.ema[0] == r.snapshot.ema[1]:
        found.append(_clash("snapshot.ema", "the two widths are the same"))
    if r.validate_.samples is not None and not r.validate_.every:
        found.append(_idle("validate.samples", "has no effect while validate.every is 0", "validate.every"))
    return found


def _optimizer_rules(r: Recipe) -> list[Clash]:
    found = []
    optimizer, t = "train.optimizer", r.train
    if t.optimizer == "adamw_bf16" and t.betas[1] > 0.99:
        message = f"second beta {t.betas[1]} > 0.99 never lets a bf16 second moment fall; use 0.99"
        found.append(_clash("train.betas", message, optimizer))
    if t.optimizer == "adamw_bf16" and r.adapter is None:
        found.append(_clash(optimizer, "adamw_bf16 is for adapters; a whole network is trained in fp32 with 'adamw'"))
    if t.optimizer == "adamw_bf16" and t.precision == "fp32":
        message = "adamw_bf16 keeps parameters in bf16; set train.precision = 'bf16'"
        found.append(_clash(optimizer, message, "train.precision"))
    if r.adapter is None and r.base.quant != "none":
        found.append(_clash("base.quant", "a quantized base is frozen: add an [adapter] table or set quant = 'none'"))
    return found


def _swap_rules(r: Recipe) -> list[Clash]:
    swap = "base.swap"
    if not r.base.swap:
        return []
    if r.adapter is None:
        return [_clash(swap, "a base whose blocks wait on the CPU is frozen: add an [adapter] table, or set swap = 0")]
    if r.base.swap != "auto" and r.base.swap < 3:
        return [_clash(swap, f"{r.base.swap} saves nothing, since two blocks fit on the GPU at any time; use 3 or more")]
    if r.base.quant == "int8-quanto":
        message = "does not work with quant = 'int8-quanto', no plain tensors; 'int8' has the same codes"
        return [_clash(swap, message, "base.quant")]
    if r.train.gradient_checkpointing is not True and r.train.gradient_checkpointing != "auto":
        wanted = 'needs train.gradient_checkpointing = true or "auto"'
        message = f"{wanted}: gradients read a block's weights again, and it has left by then"
        return [_clash(swap, message, "train.gradient_checkpointing")]
    return []


def _adapter_rules(a: Adapter) -> list[Clash]:
    found = []
    for i, target in enumerate(a.targets):
        key = f"adapter.targets.{i}"
        if (target.pattern is None) == (target.preset is None):
            found.append(_clash(key, "set exactly one of pattern and preset"))
        if a.kind == "lora" and target.factor is not None:
            message = "belongs to kind = 'lokr'; LoRA has only a rank"
            found.append(_clash(f"{key}.factor", message, "adapter.kind"))
        if a.kind == "lora" and target.rank == "full":
            message = "'full' belongs to kind = 'lokr'; give LoRA a number"
            found.append(_clash(f"{key}.rank", message, "adapter.kind"))
        if target.factor == 0:
            found.append(_clash(f"{key}.factor", "must be -1 or at least 1"))
    if a.init == "ones" and a.kind == "lora":
        message = "'ones' is a LoKr start; LoRA knows 'default' and 'perturbed_normal'"
        found.append(_clash("adapter.init", message, "adapter.kind"))
    if a.init_scale is not None and a.init != "perturbed_normal":
        found.append(_idle("adapter.init_scale", f"has no effect with init = '{a.init}'", "adapter.init"))
    return found
