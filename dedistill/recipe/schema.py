"""What a recipe may say: one pydantic model per TOML table. No torch in this package.

Every field's description is what the JSON schema shows in an editor. Unknown keys are refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr

from dedistill.flow.guidance import guider_of
from dedistill.recipe.data_tables import Data, Resolution
from dedistill.recipe.fields import (
    BY_FAMILY,
    SAFE_NAME,
    Auto,
    Bounded,
    Count,
    Default,
    KeySource,
    Place,
    Positive,
    Seed,
    Share,
    Steps,
    Table,
    Whole,
)
from dedistill.recipe.model_tables import Adapter, Base, Model
from dedistill.recipe.objectives import ObjectiveName


class Run(Table):
    name: str = Field(
        min_length=1,
        max_length=100,
        pattern=SAFE_NAME,
        description="Name of the run, for logs, trackers and folders of images.",
    )
    out: Place = Field(description="Run directory: metrics, checkpoints, snapshots, images.")
    seed: Seed = Field(0, description="Seed of every random draw of the run.")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue from the newest good checkpoint; never: refuse a directory that holds a run."
    )
    stuck_after: Annotated[float, Field(ge=0)] = Field(
        600.0,
        description="Seconds without a sign of life after which a process writes its stacks and ends with code 75; 0: never. "
        "Six times that while loading or waiting for other processes.",
    )


MOST_SHIFTED = 1000.0
"""At which the middle of a path is .999 noise."""
Shift = Annotated[float, Field(gt=0, le=MOST_SHIFTED)] | Literal["auto"]


def _guider(text: str) -> str:
    guider_of(text)
    return text


SolverName = Literal["euler", "heun", "dpmpp_2m", "unipc"]
"""Those of ``flow.solvers``."""


class Timesteps(Table):
    density: Literal["uniform", "logit_normal", "beta", "mode", "cosmap", "u_shaped"] = Field(
        "uniform", description="Density of sigma (1 is noise, 0 is data) before the shift."
    )
    alpha: Annotated[
        Annotated[float, Field(gt=0, le=100)] | None,
        Default(2.0, "timesteps.density", ("beta",)),
        Default(4.0, "timesteps.density", ("u_shaped",)),
    ] = Field(None, description="beta: first parameter. u_shaped: the ends are cosh(alpha / 2) times as likely as the middle.")
    beta: Annotated[Annotated[float, Field(gt=0)] | None, Default(2.0, "timesteps.density", ("beta",))] = Field(
        None, description="beta: second parameter."
    )
    mean: Annotated[float | None, Default(0.0, "timesteps.density", ("logit_normal",))] = Field(
        None, description="logit_normal: mean of logit(sigma), noise being 1; diffusers' --logit_mean is its negative."
    )
    std: Annotated[Annotated[float, Field(gt=0)] | None, Default(1.0, "timesteps.density", ("logit_normal",))] = Field(
        None, description="logit_normal: deviation."
    )
    scale: Annotated[Annotated[float, Field(ge=-1, le=1.7519)] | None, Default(1.29, "timesteps.density", ("mode",))] = Field(
        None, description="mode: s of SD3, eq. 20."
    )
    shift: Shift = Field(
        1.0,
        description="In training: sigma' = s sigma / (1 + (s-1) sigma). auto: the model's own, which may grow with the number "
        "of image tokens. Images are made with sample.shift.",
    )
    stratify: bool = Field(True, description="One draw in each of `batch` equal shares of probability, per step.")


class Train(Table):
    objective: ObjectiveName = Field(
        "flow",
        description="flow: flow matching on data; distill: velocity between stored points of a teacher's trajectories; "
        "reflow: flow matching on the stored noise and its image; rectified_diffusion: the same by the model's "
        "own loss and noise levels; endpoint: one step from the stored noise to its image; features: the same, "
        "images also compared by the base's own features; grid: reflow at the levels of sample.steps alone; halve: one step "
        "for two of the base's; guidance: the base's guided velocity, of a network that is fed the scale; diffusion: the own "
        "loss of a model that was trained so, at the noise levels of its own schedule.",
    )
    scales: Annotated[
        Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] | None,
        Default([1.0, 7.5], "train.objective", ("guidance",)),
    ] = Field(None, description="guidance: the lowest and the highest scale that is drawn, all alike.")
    min_snr: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="diffusion: gamma of min-SNR weighting, usually 5. None: all levels count alike.",
    )
    huber: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="c of the pseudo-Huber loss sqrt(e + c^2) - c of each sample's mean squared error e, which is held back by "
        "samples far off: 0.00054 in arXiv 2405.20320. None: e itself.",
    )
    lpips: Place | None = Field(
        None,
        description="reflow, grid, endpoint: safetensors file with the state of the lpips package's LPIPS(net='vgg'), whose "
        "distance of the image that one step reaches from the pair's own is added to the loss. None: without.",
    )
    steps: Steps = Field(description="Optimizer steps in all.")
    batch: Bounded = Field(description="Global batch: samples per optimizer step, on any number of devices.")
    micro_batch: Positive | None = Field(
        None,
        description="Most samples per forward pass. None: no limit but the batch, or a process's share of it; passes without "
        "gradients take 256 at most.",
    )
    lr: Annotated[float, Field(gt=0, le=0.1)] = Field(description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay of the rate after the warm-up.")
    warmup: Count = Field(0, description="Steps of linear warm-up.")
    lr_floor: Annotated[Share | None, Default(0.0, "train.schedule", ("linear", "cosine"))] = Field(
        None, description="Final rate as a share of lr, for linear and cosine."
    )
    optimizer: Literal["adamw", "adamw_bf16"] = Field(
        "adamw", description="adamw: fp32 parameters and states; adamw_bf16: bf16 parameters and states, Kahan summation."
    )
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.99], description="Decay of the two moments."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Clip the gradient norm to this. None: no limit."
    )
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
    gradient_checkpointing: bool | Positive | Auto = Field(
        False,
        description="Recompute blocks in backward: less memory, more time. A number: only so many, the first ones. auto: as "
        "few as the card at hand allows.",
    )
    offload_activations: bool = Field(
        False, description="What recomputed blocks keep, their inputs, waits in the memory of the CPU: less memory, more time."
    )

    compile: Literal["none", "blocks"] = Field(
        "none",
        description="blocks: torch compiles each block: fewer kernels on a GPU, for minutes at the start and more memory.",
    )
    attention: Literal["torch", "cudnn"] = Field(
        "torch",
        description="cudnn: on a GPU, attention without a mask by cuDNN, where a trial at the start finds it right: faster for "
        "large images. torch: as torch chooses, without it.",
    )


class Validate(Table):
    every: Count = Field(0, description="Steps between validations; 0 never. Also at the end.")
    samples: Annotated[Bounded | None, Default(256, "validate.every")] = Field(
        None, description="Held-out samples, on fixed noise and fixed sigmas."
    )


class Meters(Table):
    every: Count = Field(
        0, description="Steps between meters of distillation; 0 never. Also before the first step and at the end."
    )
    samples: Bounded = Field(16, description="Held-out captions, on fixed noise.")
    steps: Bounded = Field(16, description="Steps of their paths, of sample.solver.")


class Checkpoint(Table):
    every: Count = Field(0, description="Steps between checkpoints; 0: only the last step.")
    keep: Annotated[Whole, Field(ge=2)] = Field(2, description="Good checkpoints kept.")


class Snapshot(Table):
    every: Count = Field(0, description="Steps between kept copies of the trained weights; 0 never.")
    ema: list[Annotated[float, Field(ge=0.01, le=0.28)]] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Widths (sigma_rel) of two power-law averages of the weights, tracked and kept beside every copy, from "
        "which dedistill posthoc makes those of other widths; usually [0.05, 0.10]. None: off.",
    )


class Online(Table):
    every: Count = Field(
        0,
        description="Steps between rounds, in which the model makes pairs as it is then, from captions of the data; 0 never. "
        "Also before the first step.",
    )
    pairs: Annotated[Whole, Field(ge=16, multiple_of=8)] = Field(256, description="Pairs that are made in each round.")
    keep: Positive | None = Field(None, description="Rounds that are trained on, the newest. None: all.")
    cfg: Annotated[float, Field(ge=0)] = Field(1.0, description="Guidance scale baked into the pairs.")
    steps: Bounded = Field(16, description="Steps of sample.solver by which they are made.")


class Log(Table):
    every: Positive = Field(1, description="Steps between lines of metrics.jsonl.")
    sigma_bins: Bounded = Field(8, description="Equal bins of sigma in which the loss is reported.")
    wandb: bool = Field(False, description="Also log to Weights & Biases; offline when there is no key.")


_Side = Annotated[Resolution | None, Default(BY_FAMILY)]


class Sample(Table):
    solver: SolverName = Field(
        "euler",
        description="How images are made from noise, in previews, sweeps, meters and stored pairs: euler; heun: of second "
        "order, two calls of the network in a step; dpmpp_2m: DPM-Solver++(2M), unipc: UniPC, of second order, one call.",
    )
    steps: Bounded = Field(16, description="Steps of the solver when images are made with this model.")
    guider: Annotated[str, AfterValidator(_guider)] = Field(
        "cfg",
        description="How guidance makes one velocity of the network's answers, at the scales of previews, sweeps and pairs: "
        "cfg, interval, rescale, apg, zero_star, skip_layers, auto; with parameters as in apg:eta=0,momentum=0.",
    )
    shift: Annotated[Shift | None, Default(BY_FAMILY)] = Field(
        None,
        description="Shift of the solver's sigmas in previews, sweeps, meters and stored pairs, and in an exported scheduler. "
        "auto: the model's own, as its scheduler says. None: auto, or 1 for a family without schedulers.",
    )
    height: _Side = Field(None, description="Image height in pixels. None for networks of one size.")
    width: _Side = Field(None, description="Image width in pixels. None for networks of one size.")
    negative: str = Field("", description="Prompt of the unconditional branch of CFG; the empty prompt is the trained one.")
    guidance: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Value fed to a distilled guidance embedding when sampling. As model.guidance; none for bypass."
    )


class Preview(Table):
    every: Count = Field(0, description="Steps between previews; 0 never. Also before the first step.")
    prompts: list[str] = Field(default_factory=list, description="Prompts of the previews.")
    cfgs: list[Annotated[float, Field(ge=0)]] = Field([1.0, 3.0], min_length=1, description="Guidance scales, side by side.")
    skip: Count = Field(0, description="First steps without guidance.")
    seed: Seed = Field(0, description="Seed of the noise, the same at every preview.")


def shift_in_numbers(shift: float | str | None, own: Callable[[], float]) -> float:
    """A ``shift`` of a resolved recipe; ``own`` gives the model's, for auto."""
    return float(shift) if isinstance(shift, (int, float)) else own()


class Recipe(Table):
    run: Run
    model: Model
    base: Base = Base()
    adapter: Adapter | None = Field(None, description="None, without this table: the whole network is trained.")
    data: Data
    timesteps: Timesteps = Timesteps()
    train: Train
    validate_: Validate = Field(Validate(), alias="validate")
    meters: Meters = Meters()
    online: Online = Online()
    checkpoint: Checkpoint = Checkpoint()
    snapshot: Snapshot = Snapshot()
    log: Log = Log()
    sample: Sample = Sample()
    preview: Preview = Preview()

    _places: dict[str, KeySource] = PrivateAttr(default_factory=dict)
    _files: tuple[Path, ...] = PrivateAttr(default=())
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files it was read from: itself and what it extends."""
        return self._files

    @property
    def notes(self) -> tuple[str, ...]:
        """On keys of what it extends that have no effect with its own, and so were left out."""
        return self._notes

    def __eq__(self, other: object) -> bool:
        """Two recipes are equal if they say the same, wherever they say it."""
        return isinstance(other, Recipe) and self.resolved() == other.resolved()

    def says(self, key: str) -> bool:
        """Whether the recipe sets ``key`` itself, or ``--set`` does, and not a default."""
        return key in self._places

    def place(self, key: str, *others: str) -> str:
        """``file:line`` of a dotted key such as ``adapter.targets.0.pattern``, or of the table it is in; else nothing.

        others: keys that it does not go with. Then it is the place that was said last: what it was laid over was right.
        """
        parts = key.split(".")
        own = (self._places.get(".".join(parts[:n])) for n in range(len(parts), 0, -1))
        said = [next(filter(None, own), None), *map(self._places.get, others)]
        return str(max(filter(None, said), key=lambda place: place.weight, default=""))

    def where(self, key: str) -> str:
        """``file:line: key``, for errors found after loading."""
        place = self.place(key)
        return f"{place}: {key}" if place else key

    def placed(self, message: str) -> str:
        """``message`` with file and line in front, when it begins with a key that the recipe sets."""
        place = self._places.get(message.partition(":")[0])
        return f"{place}: {message}" if place else message

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain data; keys named as in TOML. ``recipe.resolve`` fills in defaults that depend on others."""
        return self.model_dump(mode="json", by_alias=True)
