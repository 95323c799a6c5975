"""Images from a model, the numbers that judge them, and the sweep that makes many of them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samplings import at
from scipy.linalg import sqrtm
from test_judges import write_clip

from dedistill.data.digits import load_digits
from dedistill.errors import UserError
from dedistill.evaluation.judges import ClipJudge, DigitJudge, frechet_distance, judge_for, precision_recall
from dedistill.evaluation.numbers import image_numbers
from dedistill.evaluation.sweep import Candidate, Grid, guiders_at, save_png, sweep
from dedistill.flow import keyed
from dedistill.flow.guidance import ClassifierFree
from dedistill.flow.solvers import sigma_grid
from dedistill.models.model import Model, build_model
from dedistill.recipe.resolve import recipe_of
from dedistill.report.sweep import write_sweep_page
from dedistill.sampling.sampler import sample, start_noise, trajectories

PROMPTS = ["two then three", "the digit 7 and the digit 1", "handwritten zero and 9"]
IMAGE = (1, 8, 16)


def model(mask: str = "bool", seed: int = 0, **tables) -> Model:
    sizes = {"layers": 1, "single_layers": 1, "heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6]}
    new = {"height": 8, "width": 16, "patch": 4, "text_dim": 16, "pooled_dim": 16, **sizes}
    return build_model(
        recipe_of(
            {
                "run": {"name": "a", "out": "a", "seed": seed},
                "model": {"family": "pixel_flux", "mask": mask, "new": new},
                "data": {"source": "digits"},
                "train": {"steps": 1, "batch": 4, "lr": 1e-3, **tables.pop("train", {})},
                **tables,
            }
        )
    )


@pytest.fixture(scope="module")
def masked() -> Model:
    return model()


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return DigitJudge(load_digits(0.0))


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def count_calls(denoiser: torch.nn.Module) -> list[int]:
    """A list that grows by the batch size at every evaluation of ``denoiser``."""
    calls: list[int] = []
    denoiser.register_forward_hook(lambda module, args, kwargs, out: calls.append(len(kwargs["timestep"])), with_kwargs=True)
    return calls


def test_rows_of_noise_do_not_depend_on_their_number():
    """Seeds fixed per cell: row i is the same in a sheet of 3 and of 9; seeds and rows differ."""
    many, few = start_noise(5, 9, IMAGE), start_noise(5, 3, IMAGE)
    assert many.shape == (9, *IMAGE) and torch.equal(many[:3], few)
    assert not torch.equal(start_noise(6, 3, IMAGE), few) and not torch.equal(few[0], few[1])
    assert float(start_noise(0, 200, IMAGE).std()) == pytest.approx(1, abs=0.02)


@torch.no_grad()
def by_hand(own: Model, noise: torch.Tensor, sigmas: np.ndarray, cfg: float, skip: int) -> torch.Tensor:
    """Euler with both branches evaluated at every step, whether they count or not."""
    text, empty = own.encode(PROMPTS), own.encode([""] * len(PROMPTS))
    for i in range(len(sigmas) - 1):
        s = torch.full((len(noise),), float(sigmas[i]))
        w = 1.0 if i < skip else cfg
        with_text, without = own.velocity(noise, s, text), own.velocity(noise, s, empty)
        v = without + w * (with_text - without)
        noise = noise + float(sigmas[i + 1] - sigmas[i]) * v
    return noise


@pytest.mark.parametrize(
    ("cfg", "skip", "steps", "evaluations"),
    [
        (1.0, 0, 5, 5),
        (1.0, 3, 5, 5),
        (3.0, 0, 5, 10),
        (3.0, 2, 5, 8),
        (3.0, 5, 5, 5),
        (3.0, 9, 5, 5),
        (0.0, 0, 4, 8),
        (2.5, 1, 1, 1),
    ],
)
def test_guidance_costs_and_gives_what_it_says(cfg, skip, steps, evaluations):
    """CFG 1 needs one evaluation per step, the first ``skip`` steps too; the result is that of the formula."""
    own, noise = model(), start_noise(0, len(PROMPTS), IMAGE)
    calls = count_calls(own.components.denoiser)
    found = sample(own, PROMPTS, noise, at(steps, cfg, skip))
    assert calls == [len(PROMPTS)] * evaluations
    torch.testing.assert_close(found, by_hand(own, noise, sigma_grid(steps), cfg, skip), rtol=0, atol=1e-5)
    plain = sample(own, PROMPTS, noise, at(steps))
    assert (float((found - plain).abs().max()) > 1e-4) == (cfg != 1 and skip < steps)
    assert found.dtype == torch.float32 and not found.requires_grad


def test_chunks_make_the_same_images(masked, monkeypatch):
    """The size of a chunk is no setting of the image: a prompt alone, or among others, gives the same one."""
    noise, how = start_noise(0, 3, IMAGE), at(3, 3)
    whole = sample(masked, PROMPTS, noise, how)
    monkeypatch.setattr(masked, "chunk", 2)
    states = list(trajectories(masked, PROMPTS, noise, how))
    assert [(len(c), len(c[0])) for c in states] == [(4, 2), (4, 1)]
    assert torch.equal(torch.cat([c[0] for c in states]), noise)
    torch.testing.assert_close(torch.cat([c[-1] for c in states]), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(sample(masked, PROMPTS[1:2], noise[1:2], how), whole[1:2], rtol=0, atol=1e-5)


def test_a_micro_batch_bounds_sampling_too():
    """A model that only fits two samples at a time makes images two at a time."""
    assert model(train={"micro_batch": 2}).chunk == 2 and model().chunk == 256


def test_images_are_made_on_the_shifted_sigmas_of_the_recipe(tmp_path):
    """The grid of a sweep follows sample.shift, a number or the family's own, and not that of training; the cell says it."""
    own = model(sample={"shift": 3.0}, timesteps={"shift": 2.0})
    auto = model(sample={"shift": "auto"})
    assert own.grid_shift == 3.0 and auto.grid_shift == auto.shift(auto.components.sample_shape) != 1.0 == model().grid_shift
    grid = Grid((ClassifierFree(),), prompts=tuple(PROMPTS), seeds=(0,))
    found = sweep([Candidate("a", "w", 3, lambda: own)], grid, tmp_path, title="t", judge=None, say=lambda line: None)
    assert [cell["shift"] for cell in found["cells"]] == [3.0]
    assert {row["shift"] for row in json.loads((tmp_path / "index.json").read_text())} == {3.0}
    noise = start_noise(0, 3, IMAGE)
    wanted, plain = (sample(replace(own, grid_shift=shift), PROMPTS, noise, at(3))[0] for shift in (3.0, 1.0))
    save_png(wanted, tmp_path / "wanted.png"), save_png(plain, tmp_path / "plain.png")
    made = pixels(tmp_path / "images/a/cfg1_skip0/p000_s0.png")
    assert made == pixels(tmp_path / "wanted.png") != pixels(tmp_path / "plain.png")


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_padding_is_invisible_to_a_masked_model_only(cfg, masked):
    """Padded to 8, 12, 24 or 48 tokens a prompt gives one image; without the mask it gives four."""
    noise, how = start_noise(0, 3, IMAGE), at(4, cfg)
    for own, same in ((masked, True), (model("none"), False)):
        first, *others = (sample(own, PROMPTS, noise, how, length=n) for n in (8, 12, 24, 48))
        for other in others:
            assert (float((other - first).abs().max()) < 1e-5) == same
            assert same or float((other - first).abs().max()) > 1e-3


def test_sampling_leaves_the_mode_of_the_model(masked):
    """A model in training goes on training, one in evaluation stays there."""
    for training in (True, False):
        masked.root.train(training)
        sample(masked, PROMPTS, start_noise(0, 3, IMAGE), at(2))
        assert masked.root.training is training


def test_leaving_a_trajectory_early_leaves_the_mode_too():
    """Whoever takes only the first chunk, or fails inside the loop, finds the model as it was."""
    own = model()
    own.root.train()
    states = trajectories(own, PROMPTS, start_noise(0, 3, IMAGE), at(2))
    next(states)
    states.close()
    assert own.root.training


def test_numbers_of_images():
    """Burnt pixels, contrast and detail order flat, blurred, natural, noisy and saturated images as they should."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    noise = keyed.noise(0, "image", 0, [0], (16, 16))[0]
    wave = 0.8 * torch.sin(2 * torch.pi * x / 16) * torch.cos(2 * torch.pi * y / 16)
    board = 1.0 - 2 * ((x + y) % 2)
    made = {"flat": 0 * x + 0.3, "wave": wave, "mixed": wave + 0.3 * noise, "noise": noise.clamp(-1, 1), "board": board}
    made |= {f"k{k}": torch.cos(2 * torch.pi * k * x / 16) for k in (4, 5)}
    made |= {"burnt": 3 * wave, "edge": wave.sign(), "lost": torch.full_like(x, torch.nan)}
    numbers = image_numbers(torch.stack([torch.stack([p]) for p in made.values()]))
    n = {k: dict(zip(made, v.tolist())) for k, v in numbers.items()}
    assert n["detail"]["flat"] == n["contrast"]["flat"] == n["contrast"]["lost"] == 0
    assert [n["detail"][k] for k in ("wave", "k4", "k5", "board")] == pytest.approx([0, 0, 1, 1], abs=1e-9)
    assert n["detail"]["wave"] < n["detail"]["mixed"] < n["detail"]["noise"] < n["detail"]["board"]
    assert n["detail"]["burnt"] == pytest.approx(n["detail"]["wave"], abs=1e-9), "contrast alone is no detail"
    assert n["contrast"]["wave"] == pytest.approx(0.4, rel=1e-5) and n["contrast"]["burnt"] == pytest.approx(1.2, rel=1e-5)
    assert (
        n["saturated"]["burnt"] == pytest.approx(float((3 * wave).abs().gt(1.1).float().mean()))
        and n["saturated"]["burnt"] > 0.3
    )
    assert all(v == 0 for k, v in n["saturated"].items() if k not in ("burnt", "mixed")), "at the edge is not beyond it"
    colour = image_numbers(torch.stack([torch.stack([wave, wave, noise.clamp(-1, 1)])]))
    assert n["detail"]["wave"] < colour["detail"][0] < n["detail"]["noise"]


def gaussian(mean: np.ndarray, root: np.ndarray, seed: int) -> np.ndarray:
    """500 points whose mean and covariance are exactly ``mean`` and ``root @ root.T``."""
    z = np.random.default_rng(seed).standard_normal((500, len(mean)))
    z -= z.mean(0)
    return z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T @ root.T + mean


def test_frechet_distance():
    """Known answers: |mean|^2 + sum (a - b)^2 for axes of their own, scipy's root for others; 0 to itself; symmetric."""
    a = gaussian(np.array([1.0, 0, -2]), np.diag([1.0, 2, 3]), 0)
    b = gaussian(np.array([0.0, 2, -2]), np.diag([2.0, 2, 0.5]), 1)
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 6.25, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    root = np.array([[1.0, 0, 0], [0.7, 2, 0], [-0.3, 0.4, 1.5]])
    c = gaussian(np.zeros(3), root, 2)
    wanted = 5 + np.trace(root @ root.T + np.diag([1.0, 4, 9]) - 2 * sqrtm(root @ root.T @ np.diag([1.0, 4, 9])).real)
    assert frechet_distance(a, c) == pytest.approx(wanted, rel=1e-6) == pytest.approx(frechet_distance(c, a), rel=1e-6)


def test_precision_and_recall():
    """arXiv 1904.06991: 1 and 1 for the same set, 0 and 0 for sets apart, and what a collapsed or a spread set loses."""
    real = np.random.default_rng(0).standard_normal((200, 5))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)
    precision, recall = precision_recall(real[:5].repeat(40, 0), real)
    assert precision == 1 and recall < 0.2
    precision, recall = precision_recall(np.concatenate([real, real + 100]), real)
    assert precision == 0.5 and recall == 1


def test_the_judge_reads_digits(judge):
    """Better than 97 % on digits it never saw; real canvases agree with true captions, and with no others."""
    source = load_digits(0.0)
    assert judge.held_out_accuracy > 0.97
    batch = source.draw(source.slots(0, 0, 200))
    assert judge.correct(batch.latents, batch.captions).tolist() == [1.0] * 200
    unseen = source.draw(source.slots(0, 0, 200, held_out=True))
    assert judge.correct(unseen.latents, unseen.captions).mean() > 0.96
    shifted = batch.captions[1:] + batch.captions[:1]
    assert judge.correct(batch.latents, shifted).mean() < 0.25
    assert judge_for(source).side == 8 and judge_for(object()) is None


def test_prompts_without_digits_have_no_accuracy(judge, tmp_path):
    """They are left out of the mean, and a sweep of only such prompts has none."""
    source = load_digits(0.0)
    batch = source.draw(source.slots(0, 0, 2))
    assert np.isnan(judge.correct(batch.latents, [batch.captions[0], "a cat"])).tolist() == [False, True]
    mixed = Grid((ClassifierFree(),), prompts=("two, then three!", "a cat"), seeds=(0,))
    (cell,) = run([Opened().candidate("a")], tmp_path / "mixed", mixed, judge)["cells"]
    rows = strict(tmp_path / "mixed" / "index.json")
    assert ["correct" in row for row in rows] == [True, False] and cell["accuracy"] == rows[0]["correct"]
    none = Grid((ClassifierFree(),), prompts=("a cat", "a dog"), seeds=(0,))
    scores = run([Opened().candidate("a")], tmp_path / "none", none, judge)
    assert "accuracy" not in scores["cells"][0] and "accuracy" not in [n["key"] for n in scores["numbers"]]
    write_sweep_page(tmp_path / "none"), write_sweep_page(tmp_path / "mixed")


def test_another_judge_judges_again(tmp_path, judge):
    """Cells are reused only with the scores of a judge made from the same images."""
    source = load_digits(0.0)
    source.train = tuple(part[:-1] for part in source.train)
    other = DigitJudge(source)
    run([Opened().candidate("a")], tmp_path, judge=judge)
    opened = Opened()
    run([opened.candidate("a")], tmp_path, judge=judge)
    assert opened.names == []
    run([opened.candidate("a")], tmp_path, judge=other)
    assert opened.names == ["a"]


def test_the_judge_measures_distance_to_real_digits(judge):
    """Real digits are near and lie among real ones; noise, black and broken images do not."""
    real = load_digits(0.0).draw(load_digits(0.0).slots(1, 0, 300, held_out=True)).latents
    near = judge.numbers(real)
    assert near["precision"] > 0.8 and near["recall"] > 0.6
    noise, black, lost = keyed.noise(0, "bad", 0, range(300), IMAGE), -torch.ones_like(real), torch.full_like(real, torch.nan)
    assert judge.numbers(lost) == judge.numbers(black)
    for far in (judge.numbers(noise), judge.numbers(black)):
        assert far["frechet"] > 10 * near["frechet"] and far["precision"] < 0.1 and far["recall"] < 0.1


GRID = Grid(guiders_at((1.0, 3.0), (0, 2)), prompts=tuple(PROMPTS), seeds=(0, 7))


class Opened:
    """Candidates by name, with a record of which of them had to be loaded."""

    def __init__(self):
        self.names: list[str] = []

    def candidate(self, name: str, weights: str = "w", seed: int = 0, steps: int = 3) -> Candidate:
        def load() -> Model:
            self.names.append(name)
            return model(seed=seed)

        return Candidate(name, weights, steps, load)

    def pair(self, **changes) -> list[Candidate]:
        return [self.candidate("base"), self.candidate("last", seed=1, **changes)]


def run(candidates: list[Candidate], out: Path, grid: Grid = GRID, judge: DigitJudge | None = None) -> dict:
    return sweep(candidates, grid, out, title="t", judge=judge, say=lambda line: None)


def stamps(out: Path) -> dict[str, int]:
    return {p.relative_to(out / "images").as_posix(): p.stat().st_mtime_ns for p in out.glob("images/**/*.png")}


def strict(path: Path):
    """JSON as browsers read it, without NaN and Infinity."""
    return json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} in {path.name}"))


def test_a_sweep_is_complete(tmp_path, judge):
    """A row per image with its settings and numbers, the image at its own resolution, CFG 1 only once."""
    scores = run(Opened().pair(), tmp_path, judge=judge)
    rows = strict(tmp_path / "index.json")
    places = {(r["candidate"], r["cfg"], r["skip"], r["prompt"], r["seed"]) for r in rows}
    cells = [(c, w, k) for c in ("base", "last") for w, k in ((1, 0), (3, 0), (3, 2))]
    assert places == {(*cell, p, s) for cell in cells for p in PROMPTS for s in (0, 7)} and len(rows) == len(places) == 36
    for row in rows:
        assert {"file", "steps", "saturated", "contrast", "detail", "blur", "shadow", "clipped", "correct"} <= row.keys()
        assert Image.open(tmp_path / row["file"]).size == (16, 8)
    assert len({r["file"] for r in rows}) == 36 == len(stamps(tmp_path))
    assert strict(tmp_path / "scores.json") == scores
    assert sorted((c["candidate"], c["cfg"], c["skip"]) for c in scores["cells"]) == sorted(cells)
    for cell in scores["cells"]:
        own = [r for r in rows if all(r[k] == cell[k] for k in ("candidate", "cfg", "skip"))]
        assert cell["images"] == 6 and cell["accuracy"] == pytest.approx(np.mean([r["correct"] for r in own]))
        assert cell["shadow"] == pytest.approx(np.mean([r["shadow"] for r in own]))
        assert cell.keys() >= {n["key"] for n in scores["numbers"]} >= {"diversity", "blur"}
    row = next(
        r for r in rows if (r["candidate"], r["cfg"], r["skip"], r["seed"]) == ("last", 3, 2, 7) and r["prompt"] == PROMPTS[1]
    )
    again = sample(model(seed=1), PROMPTS, start_noise(7, 3, IMAGE), at(3, 3, 2))
    save_png(again[1], tmp_path / "again.png")
    assert pixels(tmp_path / "again.png") == pixels(tmp_path / row["file"])
    with Image.open(tmp_path / row["file"]) as image:  # the file tells how it was made
        assert image.text == {k: str(row[k]) for k in ("candidate", "cfg", "skip", "steps", "shift", "prompt", "seed")}


def test_a_sweep_with_clip(tmp_path):
    """Its score stands in rows and cells, its identity in the key; diversity needs two seeds."""
    clip = ClipJudge(write_clip(tmp_path / "clip"))
    grid = Grid((ClassifierFree(),), tuple(PROMPTS), (0,))
    make = partial(sweep, [Opened().candidate("base")], grid, tmp_path / "out", title="t", judge=None, say=lambda line: None)
    cell = make(clip=clip)["cells"][0]
    rows = strict(tmp_path / "out/index.json")
    made = sample(model(), PROMPTS, start_noise(0, 3, IMAGE), at(3))
    assert [r["clip"] for r in rows] == pytest.approx(clip.scores(clip.embed(made), PROMPTS).tolist(), abs=1e-5)
    assert cell["clip"] == pytest.approx(np.mean([r["clip"] for r in rows])) and "clip_frechet" not in cell
    assert "diversity" not in cell and "clip" not in make(clip=None)["cells"][0]


def test_a_sweep_makes_only_what_is_missing(tmp_path):
    """Nothing twice; new weights, another setting or a lost image remake their cells and no others."""
    first = run(Opened().pair(), tmp_path)
    files, before = {p: p.read_bytes() for p in tmp_path.glob("*.json")}, stamps(tmp_path)
    assert run((opened := Opened()).pair(), tmp_path) == first and opened.names == []
    assert stamps(tmp_path) == before and all(p.read_bytes() == raw for p, raw in files.items())
    (tmp_path / "images/base/cfg3_skip2/p001_s7.png").unlink()
    assert run(opened.pair(), tmp_path) == first and opened.names == ["base"]
    remade = {f for f, t in stamps(tmp_path).items() if t != before[f]}
    assert remade == {f for f in before if f.startswith("base/cfg3_skip2/")}
    before, opened = stamps(tmp_path), Opened()
    assert run(opened.pair(weights="other"), tmp_path) == first and opened.names == ["last"]
    assert {f for f, t in stamps(tmp_path).items() if t != before[f]} == {f for f in before if f.startswith("last/")}
    opened = Opened()
    run(opened.pair(weights="other"), tmp_path, Grid(guiders_at((1.0, 3.0), (0, 2)), tuple(PROMPTS), (0, 8)))
    assert opened.names == ["base", "last"]


def test_several_step_counts_are_cells_of_their_own(tmp_path):
    """The candidate's own count keeps the plain folder, so that cells made before are found; images differ by steps."""
    once = Grid(guiders_at((1.0, 3.0), (0, 2)), tuple(PROMPTS), (0,))
    before = run([Opened().candidate("last")], tmp_path, once)["cells"]
    opened = Opened()
    both = run([opened.candidate("last")], tmp_path, replace(once, steps=(3, 5)))["cells"]
    assert both[:3] == before and [(c["cfg"], c["skip"], c["steps"]) for c in both[3:]] == [(1, 0, 5), (3, 0, 5), (3, 2, 5)]
    assert {p.name for p in (tmp_path / "images/last").iterdir()} == {
        f"cfg{c}_skip{s}{end}" for c, s in ((1, 0), (3, 0), (3, 2)) for end in ("", "_steps5")
    }
    again = sample(model(), PROMPTS, start_noise(0, 3, IMAGE), at(5, 3, 2))
    save_png(again[1], tmp_path / "again.png")
    assert pixels(tmp_path / "again.png") == pixels(tmp_path / "images/last/cfg3_skip2_steps5/p001_s0.png")
    run([Opened().candidate("last")], tmp_path, replace(once, steps=(3, 5)))
    assert opened.names == ["last"]


def test_an_interrupted_sweep_continues(tmp_path):
    """Cells finished before the interruption are kept, and the whole equals one that was never interrupted."""

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(Opened().pair(), GRID, tmp_path / "a", title="t", judge=None, say=stop)
    before = stamps(tmp_path / "a")
    assert len(before) == 6
    assert run(Opened().pair(), tmp_path / "a") == run(Opened().pair(), tmp_path / "b")
    assert before.items() <= stamps(tmp_path / "a").items()
    assert (tmp_path / "a/index.json").read_bytes() == (tmp_path / "b/index.json").read_bytes()


@pytest.mark.parametrize("damage", ["", "[]", "null", "{}", '{"key": '])
def test_a_damaged_cell_is_made_again(tmp_path, damage):
    whole = run(Opened().pair(), tmp_path)
    next(tmp_path.rglob("cell.json")).write_text(damage)
    assert run(Opened().pair(), tmp_path) == whole


@pytest.mark.parametrize(
    "part", [{"cell": ["x"]}, {"cell": {"candidate": "last"}}, {"rows": [{"file": "a.png"}]}, {"rows": {}}]
)
def test_a_cell_whose_parts_are_damaged_is_made_again(tmp_path, part):
    whole = run(Opened().pair(), tmp_path)
    file = next(tmp_path.rglob("cell.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | part))
    assert run(Opened().pair(), tmp_path) == whole


DAMAGE = {
    "emptied": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "without its end": lambda raw: raw[:-12],
    "zeroed from the middle on": lambda raw: raw[: len(raw) // 2] + bytes(len(raw) // 2),
    "one bit flipped": lambda raw: raw[:-30] + bytes([raw[-30] ^ 4]) + raw[-29:],
    "something else": lambda raw: b"<html>",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_image_of_a_finished_cell_is_made_again(tmp_path, damage):
    """As a loss of power leaves it; byte for byte the same, and no other cell with it."""
    whole, opened = run(Opened().pair(), tmp_path), Opened()
    files = {p: p.read_bytes() for p in tmp_path.rglob("*.png")}
    hurt = sorted(files)[1]
    hurt.write_bytes(damage(files[hurt]))
    assert run(opened.pair(), tmp_path) == whole and len(opened.names) == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.png")} == files


@pytest.mark.parametrize("earlier", [{}, {"passes": 5}])
def test_the_cost_of_a_cell_that_was_made_earlier_is_nfe(tmp_path, earlier):
    """Cells of earlier versions say "passes", the oldest nothing; neither is made again."""
    grid = Grid(guiders_at((3.0,), (1,)), tuple(PROMPTS), (0,))
    before = run([Opened().candidate("last")], tmp_path, grid)
    file = next(tmp_path.rglob("cell.json"))
    table = json.loads(file.read_text())
    assert table["cell"].pop("nfe") == 5
    file.write_text(json.dumps({**table, "cell": table["cell"] | earlier}))
    opened = Opened()
    assert run([opened.candidate("last")], tmp_path, grid) == before and opened.names == []


def test_numbers_that_are_measured_otherwise_are_measured_again(tmp_path, monkeypatch):
    """A cell whose numbers are of another version of the meters is made again."""
    opened = Opened()
    run(opened.pair(), tmp_path)
    monkeypatch.setattr("dedistill.evaluation.sweep.VERSION", -1)
    run(opened.pair(), tmp_path)
    assert opened.names == ["base", "last"] * 2


def test_a_judge_that_comes_later_judges_all(tmp_path, judge):
    """Cells made without a judge have no accuracy, so a sweep with one does not reuse their scores."""
    run(Opened().pair(), tmp_path)
    assert all("accuracy" in c for c in run(Opened().pair(), tmp_path, judge=judge)["cells"])


def test_a_broken_model_still_gives_valid_json(tmp_path, judge):
    """Images of NaN are counted and shown as what they are, and both files can still be read."""
    own = model()
    with torch.no_grad():
        own.components.denoiser.proj_out.weight.fill_(torch.nan)
    run([Candidate("broken", "w", 2, lambda: own)], tmp_path, judge=judge)
    assert len(strict(tmp_path / "index.json")) == 18 and len(strict(tmp_path / "scores.json")["cells"]) == 3


def test_two_candidates_of_one_name_are_refused(tmp_path):
    """Their images would overwrite each other."""
    with pytest.raises(UserError, match="share a name") as caught:
        run([Opened().candidate("last"), Opened().candidate("last", weights="other")], tmp_path)
    assert caught.value.exit_code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", ["a 7", "ein rotes Haus, Größe 3", "赤い太陽 \U0001f305", "two\nlines", ""])
def test_a_png_tells_how_it_was_made(tmp_path, prompt):
    """The parameters are in the image's own text chunks, whatever the script of the prompt."""
    save_png(torch.zeros(3, 4, 4), tmp_path / "a.png", {"prompt": prompt, "seed": 3, "cfg": 2.5})
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"prompt": prompt, "seed": "3", "cfg": "2.5"}


def test_values_of_a_png(tmp_path):
    """-1 is 0, 1 is 255, beyond is clamped, NaN is the middle; one channel is grey, three are RGB, nothing is resized."""
    grey = torch.tensor([[[-2.0, -1.0, -0.5, 0.0], [0.5, 1.0, 7.0, torch.nan]]])
    save_png(grey, tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as image:
        assert image.mode == "L" and np.array(image).tolist() == [[0, 0, 64, 128], [191, 255, 255, 128]]
    save_png(torch.stack([grey[0], -grey[0], 0 * grey[0]]), tmp_path / "rgb.png")
    with Image.open(tmp_path / "rgb.png") as image:
        assert image.mode == "RGB" and image.size == (4, 2) and image.getpixel((1, 0)) == (0, 255, 128)
