"""What a recipe may say: one pydantic model per TOML table. No torch in this package.

Every field's description is what the JSON schema shows in an editor. Unknown keys are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
SAFE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._ -]*$"
"""Names that are folders somewhere: no separators, nothing hidden, no way up."""


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class Run(Table):
    name: str = Field(
        min_length=1,
        max_length=100,
        pattern=SAFE_NAME,
        description="Name of the run, for logs, trackers and folders of pictures.",
    )
    out: str = Field(min_length=1, description="Run directory: metrics, checkpoints, snapshots, pictures.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Key of every random draw of the run.")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue from the newest good checkpoint; never: refuse a directory that holds a run."
    )
    stuck_after: Annotated[float, Field(ge=0)] = Field(
        600.0,
        description="Seconds without a sign of life after which a process writes its stacks and ends with code 75; 0: never. "
        "Six times that while loading or waiting for other processes.",
    )


class Architecture(Table):
    """Sizes of a network that starts from random weights."""

    channels: Positive = Field(1, description="Channels of a picture.")
    height: Positive = Field(description="Picture height in pixels.")
    width: Positive = Field(description="Picture width in pixels.")
    patch: Positive = Field(description="Side of the square of pixels that makes one token.")
    layers: Positive = Field(description="Double-stream blocks.")
    single_layers: Positive = Field(description="Single-stream blocks.")
    heads: Positive = Field(description="Attention heads.")
    head_dim: Positive = Field(description="Width of one head; the hidden size is heads * head_dim.")
    rope_axes: list[Positive] = Field(min_length=3, max_length=3, description="Rotary widths; they add up to head_dim.")
    text_dim: Positive = Field(32, description="Width of a text token.")
    pooled_dim: Positive = Field(32, description="Width of the pooled text vector.")


class Model(Table):
    family: str = Field(description="Model family, e.g. pixel_flux.")
    path: str | None = Field(
        None, description="Trained weights: folder, single file, or hub id. Exactly one of path and new is set."
    )
    revision: str | None = Field(None, min_length=1, description="Commit of a hub id; required for one.")
    components: str | None = Field(
        None, description="Folder or hub id of text encoders and VAE, where path is a single file with the denoiser alone."
    )
    mask: Literal["bool", "none", "libreflux"] = Field(
        "bool",
        description="bool: padding of the text is invisible to attention; none: it takes part, as FLUX was trained; "
        "libreflux: real tokens get +1 on their scores, as that model was trained.",
    )
    t5_mask: bool = Field(
        True, description="The text encoder ignores padding too. false: as diffusers and LibreFLUX call T5, padding leaks in."
    )
    guidance: Annotated[float, Field(ge=0)] | Literal["bypass"] | None = Field(
        None, description="Fed to a distilled guidance embedding in training; default 1. bypass: go past it (Flex.1-alpha)."
    )
    text_length: Positive | None = Field(None, description="Tokens a caption is padded or cut to; default the family's.")
    new: Architecture | None = Field(None, description="Sizes of a new network with random weights.")


class Base(Table):
    quant: Literal["none", "int8", "int8-quanto"] = Field(
        "none", description="Storage of the frozen base: none, int8 (plain tensors, ours), int8-quanto (optimum-quanto)."
    )
    exclude: list[str] = Field(
        default_factory=list, description="Name patterns of linears that stay unquantized; each must match at least one."
    )


class Target(Table):
    """Linears that get an adapter of one shape. The first target that matches a name wins."""

    pattern: str | None = Field(
        None, description="Module name; * stands for anything within one dotted part, ** for any number of parts."
    )
    preset: str | None = Field(None, description="Named set of layers of the family, e.g. modulation, attention, mlp.")
    factor: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="LoKr: side of the small Kronecker factor; -1 is the most even split. Default 4."
    )
    rank: Annotated[int, Field(ge=1)] | Literal["full"] | None = Field(
        None, description="LoRA: rank (default 16). LoKr: rank of the large factor, or full (default)."
    )


class Adapter(Table):
    kind: Literal["lokr", "lora"] = Field(description="Form of the trained weight change.")
    targets: list[Target] = Field(min_length=1, description="Which linears, in order of precedence.")
    init: Literal["default", "ones", "perturbed_normal"] = Field(
        "default",
        description="default: as LyCORIS; ones: first LoKr factor 1, second 0; perturbed_normal: first 1, second small noise "
        "with the mean and deviation of the layer's own weights.",
    )
    init_scale: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Size of the perturbed_normal start relative to the weights. Default 1e-3."
    )


class PictureSet(Table):
    """Captioned pictures in one place."""

    path: str = Field(min_length=1, description="Folder of pictures, folder of tar shards, or a table (parquet, csv, jsonl).")
    name: str | None = Field(None, min_length=1, description="What it is called in messages; default the folder's name.")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="Share of the samples, relative to the other sets.")
    captions: list[str] | None = Field(
        None, min_length=1, description="Fields of json files and tables that hold captions; default those commonly used."
    )


Resolution = Annotated[int, Field(ge=16, multiple_of=16)]


class Data(Table):
    source: Literal["digits", "mnist", "pairs", "pictures"] = Field(
        description="digits: scikit-learn's 8x8 digits, two per picture; mnist: 28x28 digits padded to 32x32; "
        "pairs: stored noise and pictures from dedistill pairs; pictures: captioned pictures of your own."
    )
    path: str | None = Field(None, description="pairs: folder of shards (required). mnist: folder of IDX files (optional).")
    sets: list[PictureSet] = Field(default_factory=list, description="pictures: where they are, at least one.")
    cache: str | None = Field(None, description="pictures: folder for encoded pictures and captions (required).")
    resolutions: list[Resolution] | None = Field(
        None, min_length=1, description="pictures: sides of the squares whose area pictures are brought to. Default [1024]."
    )
    crops: list[Literal["aspect", "square", "random_aspect", "center"]] | None = Field(
        None, min_length=1, description="pictures: how they are cut; several are used in turn. Default ['aspect']."
    )
    crops_per_picture: Positive | None = Field(None, description="pictures: crops of each, per resolution. Default 1.")
    max_upscale: Annotated[float, Field(ge=1)] | None = Field(
        None, description="pictures: how much smaller ones may be enlarged; others are left out. Default 1."
    )
    missing_captions: Literal["error", "quarantine", "empty"] | None = Field(
        None, description="pictures: what becomes of a picture without a caption. Default error."
    )
    split_lines: Literal["auto", "always", "never"] | None = Field(
        None, description="pictures: whether each line of a text file is a caption of its own. Default auto."
    )
    limit: Positive | None = Field(None, description="pictures: only the first so many of each set, for trials.")
    held_out: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="pictures: share kept for validation, at least one picture. Default 0.02; 0 for none."
    )
    caption_noise: Share = Field(
        0.0, description="Share of digit words replaced at random, as in captions from the web; makes guidance matter."
    )
    caption_dropout: Share | None = Field(
        None, description="Share of captions replaced by the empty prompt. Default 0.1 for pictures, 0 for pairs."
    )


class Timesteps(Table):
    density: Literal["uniform", "logit_normal", "beta", "mode", "cosmap"] = Field(
        "uniform", description="Density of sigma (1 is noise, 0 is data) before the shift."
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="beta: first parameter. Default 2.")
    beta: Annotated[float, Field(gt=0)] | None = Field(None, description="beta: second parameter. Default 2.")
    mean: float | None = Field(None, description="logit_normal: mean of logit(sigma). Default 0.")
    std: Annotated[float, Field(gt=0)] | None = Field(None, description="logit_normal: deviation. Default 1.")
    scale: Annotated[float, Field(ge=-1, le=1.7519)] | None = Field(None, description="mode: s of SD3, eq. 20. Default 1.29.")
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1.0, description="sigma' = s sigma / (1 + (s-1) sigma). auto: from the number of tokens, by the family's rule."
    )
    stratify: bool = Field(True, description="One draw in each of `batch` equal shares of probability, per step.")

    def resolved_shift(self, dynamic: float) -> float:
        """The shift in numbers; ``dynamic`` is the family's, for ``auto``."""
        return dynamic if self.shift == "auto" else float(self.shift)


class Train(Table):
    objective: Literal["flow", "distill", "reflow"] = Field(
        "flow",
        description="flow: flow matching on data; distill: velocity between stored points of a teacher's trajectories; "
        "reflow: flow matching on the stored noise and its picture.",
    )
    steps: Positive = Field(description="Optimizer steps in all.")
    batch: Positive = Field(description="Global batch: samples per optimizer step, on any number of devices.")
    micro_batch: Positive | None = Field(
        None, description="Most samples per forward pass; default the whole batch, or a process's share of it."
    )
    lr: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay of the rate after the warm-up.")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="Steps of linear warm-up.")
    lr_floor: Share | None = Field(None, description="Final rate as a share of lr, for linear and cosine. Default 0.")
    optimizer: Literal["adamw", "adamw_bf16"] = Field(
        "adamw", description="adamw: fp32 parameters and states; adamw_bf16: bf16 parameters and states, Kahan summation."
    )
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.99], description="Decay of the two moments."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(None, description="Clip the gradient norm to this.")
    spike: Annotated[float, Field(ge=0)] = Field(
        20.0,
        description="No step is applied whose gradient norm is more than so many times the median of the last 64. 0: no limit.",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic of the network; bf16 uses autocast.")
    exact: bool = Field(
        False,
        description="Bit-equal weights on any number of processes: samples go through one by one and their gradients are "
        "added as integers. Slower.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute blocks in backward: less memory, more time.")


class Validate(Table):
    every: Annotated[int, Field(ge=0)] = Field(0, description="Steps between validations; 0 never. Also at the end.")
    samples: Positive | None = Field(None, description="Held-out samples, on fixed noise and fixed sigmas. Default 256.")


class Meters(Table):
    every: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps between meters of distillation; 0 never. Also before the first step and at the end."
    )
    samples: Positive = Field(16, description="Held-out captions, on fixed noise.")
    steps: Positive = Field(16, description="Euler steps of their paths.")


class Checkpoint(Table):
    every: Annotated[int, Field(ge=0)] = Field(0, description="Steps between checkpoints; 0: only the last step.")
    keep: Annotated[int, Field(ge=2)] = Field(2, description="Good checkpoints kept.")


class Snapshot(Table):
    every: Annotated[int, Field(ge=0)] = Field(0, description="Steps between kept copies of the trained weights; 0 never.")
    ema: list[Annotated[float, Field(ge=0.01, le=0.28)]] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Widths (sigma_rel) of two power-law averages of the weights, tracked and kept beside every copy, from "
        "which dedistill posthoc makes those of other widths; usually [0.05, 0.10]. Default none.",
    )


class Log(Table):
    every: Positive = Field(1, description="Steps between lines of metrics.jsonl.")
    sigma_bins: Positive = Field(8, description="Equal bins of sigma in which the loss is reported.")
    wandb: bool = Field(False, description="Also log to Weights & Biases; offline when there is no key.")


class Sample(Table):
    steps: Positive = Field(16, description="Euler steps when pictures are made with this model.")
    height: Resolution | None = Field(None, description="Picture height in pixels; default the family's.")
    width: Resolution | None = Field(None, description="Picture width in pixels; default the family's.")
    negative: str = Field("", description="Prompt of the unconditional branch of CFG; the empty prompt is the trained one.")
    guidance: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Fed to a distilled guidance embedding when pictures are made; default as in training."
    )


class Preview(Table):
    every: Annotated[int, Field(ge=0)] = Field(0, description="Steps between previews; 0 never. Also before the first step.")
    prompts: list[str] = Field(default_factory=list, description="Prompts of the previews.")
    cfgs: list[Annotated[float, Field(ge=0)]] = Field([1.0, 3.0], min_length=1, description="Guidance scales, side by side.")
    skip: Annotated[int, Field(ge=0)] = Field(0, description="First steps without guidance.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the noise, the same at every preview.")


class Recipe(Table):
    run: Run
    model: Model
    base: Base = Base()
    adapter: Adapter | None = Field(None, description="Without this table the whole network is trained.")
    data: Data
    timesteps: Timesteps = Timesteps()
    train: Train
    validate_: Validate = Field(Validate(), alias="validate")
    meters: Meters = Meters()
    checkpoint: Checkpoint = Checkpoint()
    snapshot: Snapshot = Snapshot()
    log: Log = Log()
    sample: Sample = Sample()
    preview: Preview = Preview()

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Two recipes are equal if they say the same, wherever they say it."""
        return isinstance(other, Recipe) and self.resolved() == other.resolved()

    def place(self, key: str) -> str:
        """``file:line`` of a dotted key such as ``adapter.targets.0.pattern``, or of the table it is in; else nothing."""
        parts = key.split(".")
        places = (self._places.get(".".join(parts[:n])) for n in range(len(parts), 0, -1))
        return next(filter(None, places), "")

    def where(self, key: str) -> str:
        """``file:line: key``, for errors found after loading."""
        place = self.place(key)
        return f"{place}: {key}" if place else key

    def placed(self, message: str) -> str:
        """``message`` with file and line in front, when it begins with a key that the recipe sets."""
        place = self._places.get(message.partition(":")[0])
        return f"{place}: {message}" if place else message

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain data with every default filled in; keys named as in TOML."""
        return self.model_dump(mode="json", by_alias=True)
