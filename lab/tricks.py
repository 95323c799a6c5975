"""What the laboratory asks: runs of one de-distillation, and which of them are compared to tell what a trick is worth."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Scale:
    """How much of everything. Steps of training, but for ``pairs``, ``prompts``, ``held_out`` and ``batches``."""

    teacher: int = 1500
    student: int = 500
    steps: int = 400
    starts: int = 300
    averaged: int = 800
    reflow: int = 400
    distilled_again: tuple[int, int, int] = (20, 100, 250)
    """The de-distilled model twice, the student once."""
    pairs: int = 1536
    prompts: int = 256
    held_out: int = 512
    batches: int = 200


FULL = Scale()
QUICK = replace(
    FULL,
    teacher=500,
    student=150,
    steps=60,
    starts=45,
    averaged=120,
    reflow=50,
    distilled_again=(10, 40, 60),
    pairs=512,
    prompts=48,
    held_out=256,
    batches=30,
)


@dataclass(frozen=True)
class Score:
    """A number of a finished run. better: "low", "high", or None where neither end is good."""

    label: str
    better: str | None = "low"


SCORES = {
    "loss": Score("held-out loss"),
    "early": Score("held-out loss after a third of the steps"),
    "accuracy_1": Score("accuracy at CFG 1", None),
    "accuracy_2": Score("accuracy at CFG 2", "high"),
    "frechet_2": Score("Frechet distance at CFG 2"),
    "frechet_4": Score("Frechet distance at CFG 4"),
    "precision_4": Score("precision at CFG 4", "high"),
    "saturated_4": Score("saturated at CFG 4"),
    "guidance": Score("guidance gap"),
    "straightness": Score("curvature of the paths"),
    "frechet_one": Score("Frechet distance in one step"),
    "frechet_16": Score("Frechet distance in 16 steps"),
}


@dataclass(frozen=True)
class Run:
    """``sets`` override dedistill:digits/dedistill. full: all weights train, no adapter. int4: the student is rounded."""

    sets: tuple[str, ...] = ()
    full: bool = False
    int4: bool = False


def _start(init: str, factor: int, *, rate: float = 1e-3, noise: str = "") -> Run:
    scale = f",init_scale={noise}" if noise else ""
    return Run(
        (
            f'train={{steps=STARTS,batch=32,lr={rate:.6g},schedule="constant",warmup=20}}',
            f'adapter={{kind="lokr",init="{init}"{scale},targets=[{{preset="blocks",factor={factor}}}]}}',
        )
    )


def _adapter(kind: str, shape: str, init: str) -> Run:
    return Run((f'adapter={{kind="{kind}",init="{init}",targets=[{{preset="blocks",{shape}}}]}}',))


def _timesteps(density: str, stratify: bool = True) -> Run:
    return Run((f'timesteps={{density="{density}",stratify={str(stratify).lower()}}}',))


FACTORS = (4, 8)
NOISES = ("1e-3", "1e-2", "1e-1")
RAISED = {f: (3 * f) ** 0.5 for f in FACTORS}
"""LyCORIS fills the first factor with noise of rms 1/sqrt(3 f): at 1 the same step moves the weights sqrt(3 f) times as far."""

RUNS = {
    "base": Run(),
    "beta_independent": _timesteps("beta", stratify=False),
    "uniform": _timesteps("uniform"),
    "uniform_independent": _timesteps("uniform", stratify=False),
    "logit_normal": _timesteps("logit_normal"),
    "mode": _timesteps("mode"),
    "dropout_0": Run(("data.caption_dropout=0",)),
    "dropout_20": Run(("data.caption_dropout=0.2",)),
    "mask_off": Run(("model.mask=none",)),
    "unquantized": Run(("base.quant=none",)),
    "int4": Run(("base.quant=none",), int4=True),
    "lokr_2": _adapter("lokr", "factor=2", "perturbed_normal"),
    "lokr_8": _adapter("lokr", "factor=8", "perturbed_normal"),
    "lora_2": _adapter("lora", "rank=2", "default"),
    "lora_8": _adapter("lora", "rank=8", "default"),
    "full": Run(('train={steps=STEPS,batch=32,lr=1e-3,schedule="cosine",warmup=20,lr_floor=0.02}',), full=True),
}
for _f in FACTORS:
    RUNS |= {f"default_{_f}": _start("default", _f), f"raised_{_f}": _start("default", _f, rate=1e-3 * RAISED[_f])}
    RUNS |= {f"ones_{_f}": _start("ones", _f)}
    RUNS |= {f"noise_{n}_{_f}": _start("perturbed_normal", _f, noise=n) for n in NOISES}


@dataclass(frozen=True)
class Comparison:
    """``label`` is read as "LABEL helps"; what it is compared with is said in it, or by the trick. main: in the verdict."""

    label: str
    run: str
    control: str
    main: bool = False


@dataclass(frozen=True)
class Trick:
    """The verdict of each comparison is told by ``primary``, which was chosen before anything was run."""

    title: str
    question: str
    primary: str
    others: tuple[str, ...]
    comparisons: tuple[Comparison, ...]


IMAGES = ("accuracy_1", "accuracy_2", "frechet_2", "frechet_4", "precision_4", "saturated_4")


def _starts(factor: int) -> Trick:
    f, plain, best = factor, f"default_{factor}", f"noise_1e-3_{factor}"
    return Trick(
        f"Starts of the adapter, factor {f}",
        "LibreFLUX starts LoKr with its first factor at 1 and its second at small noise. Constant rate of 1e-3.",
        "loss",
        ("early", "frechet_2"),
        (
            Comparison("first factor 1 and noise 1e-3, against LyCORIS' start,", best, plain, main=True),
            Comparison("first factor 1 without noise, against LyCORIS' start,", f"ones_{f}", plain),
            Comparison(
                f"LyCORIS' start at {RAISED[f]:.1f} times the rate, against the same at the rate,", f"raised_{f}", plain
            ),
            Comparison(
                "first factor 1 and noise 1e-3, against LyCORIS' start at the raised rate,", best, f"raised_{f}", main=True
            ),
            *(
                Comparison(f"noise {n}, against no noise (first factor 1),", f"noise_{n}_{f}", f"ones_{f}", main=n == "1e-3")
                for n in NOISES
            ),
        ),
    )


TRICKS = (
    Trick(
        "De-distilling",
        "The recipe against its student, and against distilling on: were it only more training, that would do as well.",
        "loss",
        ("guidance", "accuracy_1", "frechet_2", "frechet_4", "saturated_4"),
        (
            Comparison("de-distilling, against the student,", "base", "student", main=True),
            Comparison("the de-distilled model, against the teacher,", "base", "teacher"),
            Comparison("distilling the student on (control), against the student,", "longer", "student", main=True),
            Comparison("distilling again for a moment (control), against the de-distilled model,", "again_short", "base"),
            Comparison("distilling again for longer (control), against the de-distilled model,", "again_long", "base"),
        ),
    ),
    *map(_starts, FACTORS),
    Trick(
        "Caption dropout",
        "One caption in ten is replaced by the empty prompt, which guidance starts from.",
        "frechet_4",
        ("loss", *IMAGES[:3], *IMAGES[4:]),
        (
            Comparison("no dropout, against .1,", "dropout_0", "base", main=True),
            Comparison("dropout .2, against .1,", "dropout_20", "base"),
        ),
    ),
    Trick(
        "Text mask",
        "Padding is invisible to attention, where the student was trained with padding seen.",
        "loss",
        IMAGES,
        (Comparison("the mask, against none,", "base", "mask_off", main=True),),
    ),
    Trick(
        "Stratified timesteps",
        "One sigma in each of 32 equal shares of a batch, against independent draws.",
        "loss",
        IMAGES[2:],
        (
            Comparison("stratifying under Beta(2,2), against independent draws,", "base", "beta_independent", main=True),
            Comparison("stratifying under uniform, against independent draws,", "uniform", "uniform_independent", main=True),
        ),
    ),
    Trick(
        "Density of timesteps",
        "Against uniform, all stratified. The held-out loss weighs all sigmas alike, which favours uniform.",
        "frechet_2",
        ("loss", "accuracy_1", "accuracy_2", *IMAGES[3:]),
        (
            Comparison("Beta(2,2), against uniform,", "base", "uniform", main=True),
            Comparison("logit-normal, against uniform,", "logit_normal", "uniform"),
            Comparison("mode (s = 1.29), against uniform,", "mode", "uniform"),
        ),
    ),
    Trick(
        "Precision of the frozen base",
        "int8 by rows, as the recipe has it; int4 by rows (rounded before training; there is no int4 storage).",
        "loss",
        IMAGES,
        (
            Comparison("int8, against fp32,", "base", "unquantized", main=True),
            Comparison("int4, against fp32,", "int4", "unquantized", main=True),
        ),
    ),
    Trick(
        "Form of the adapter",
        "Each at one rate, untuned: 3e-3; all weights at 1e-3, on fp32 and so against LoKr on fp32. LoRA starts at 0.",
        "loss",
        IMAGES,
        (
            Comparison("LoKr of factor 2 (105 k), against factor 4 (27 k),", "lokr_2", "base", main=True),
            Comparison("LoKr of factor 8 (9 k), against factor 4,", "lokr_8", "base"),
            Comparison("LoRA of rank 2 (18 k), against LoKr of factor 4,", "lora_2", "base", main=True),
            Comparison("LoRA of rank 8 (73 k), against LoKr of factor 4,", "lora_8", "base"),
            Comparison("training all weights (463 k), against LoKr of factor 4,", "full", "unquantized", main=True),
        ),
    ),
    Trick(
        "Averages after training",
        "At a constant rate of 4e-3, from snapshots; against the last snapshot. alpha is the weight of the newest.",
        "loss",
        ("accuracy_2", "frechet_2"),
        (
            *(
                Comparison(f"LERP at alpha {a:g}, against the last snapshot,", f"alpha_{a:g}", "last", main=a in (0.2, 0.9))
                for a in (0.2, 0.4, 0.6, 0.9)
            ),
            *(
                Comparison(f"a power law of sigma_rel {s:g}, against the last snapshot,", f"power_{s:g}", "last", main=s == 0.1)
                for s in (0.05, 0.1, 0.15, 0.2)
            ),
        ),
    ),
    Trick(
        "Reflow",
        "The teacher retrained on its own pairs of noise and image, made at CFG 1.5. One step; the teacher at CFG 1.5 too.",
        "frechet_one",
        ("straightness", "frechet_16"),
        (
            Comparison("reflow once, against the teacher,", "reflow_1", "teacher_guided", main=True),
            Comparison("reflow twice, against once,", "reflow_2", "reflow_1"),
            Comparison("distilling to one step without reflow, against reflow once,", "distilled_direct", "reflow_1"),
            Comparison(
                "reflow once and then distilling, against distilling alone for as many steps,",
                "distilled_after",
                "distilled_longer",
                main=True,
            ),
        ),
    ),
)
