"""``--rehearse``: every recipe passes, and what would fail later is caught, each with one clear error."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from dedistill.cli.rehearsal import shrink, write_small_model
from dedistill.models.model import adapted_layers
from dedistill.models.registry import get_family
from dedistill.recipe import load_recipe
from dedistill.train import main

ROOT = Path(__file__).parents[2]
FLUX = [*sorted(p.stem for p in (ROOT / "dedistill" / "recipes").glob("fl*.toml")), "openflux"]
OTHERS = sorted(p.stem for p in (ROOT / "dedistill" / "recipes").glob("sd*.toml"))
DIGITS = ["digits/teacher", "digits/dedistill", "mnist/teacher", "mnist/dedistill", "mnist_flux"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two photographs, large enough for every shipped recipe, each with a short and a long caption."""
    folder = tmp_path_factory.mktemp("images")
    for name, pixels in zip(("china", "flower"), load_sample_images().images):
        for i in range(2):
            Image.fromarray(pixels).resize((1600 + 96 * i, 1200)).save(folder / f"{name}{i}.jpg")
            (folder / f"{name}{i}.txt").write_text("a photo\na long caption " + "with many words " * 8)
    return folder


@pytest.fixture
def rehearse(tmp_path, images, capsys):
    def run(recipe: str, *settings: str) -> tuple[int, str]:
        own = [f"data.sets=[{{path='{images}'}}]"] if recipe in FLUX + OTHERS else []
        words = [w for s in (f"run.out='{tmp_path}/run'", *own, *settings) for w in ("--set", s)]
        code = main([str(ROOT / "dedistill" / "recipes" / f"{recipe}.toml"), "--rehearse", *words])
        return code, capsys.readouterr().err

    return run


def test_stages_and_what_they_leave(tmp_path, monkeypatch, capsys):
    """The base is not there, and no images are: a rehearsal needs no weights, network or data; it says that a run does."""
    monkeypatch.chdir(tmp_path)
    words = ["--set", "run.out=run", "--set", "model.path=models/FLUX.1-schnell", *SKIPPED]
    code, said = main(["dedistill:flux_schnell_24gb", "--rehearse", *words]), capsys.readouterr().err
    assert code == 0, said
    missing = [line.split(": no such folder")[0] for line in said.splitlines() if line.startswith("NOT THERE YET: ")]
    assert missing[0] == "NOT THERE YET: --set: model.path: models/FLUX.1-schnell" and "data.sets.0.path" in missing[1]
    assert "no images in 'data/images' yet: rehearsing on 4 sample images of the package's own" in said
    stages = [line.split(" s  ")[1] for line in said.splitlines() if line.startswith("ok")]
    assert stages == [
        "the plan can be reached",
        "layers and sizes at full scale",
        "sample images and captions",
        "a tiny model of the same classes",
        "caches, training, validation, saving",
        "a run that is killed and continued ends the same",
        "post-hoc averages",
        "CFG sweep",
        "merge into the base",
        "export of the merged model and of the adapter",
    ]
    assert "151,315,392 trained parameters in 399 layers of a network of 11,891,178,560" in said
    out = tmp_path / "run-rehearsal"
    rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and all(r["applied"] for r in rows)
    for made in ("sweep/index.html", "merged/transformer/config.json", "exported/bfl", "run/previews/step-00000000.png"):
        assert (out / made).exists(), made
    assert not (tmp_path / "run").exists(), "the real run's directory is not touched"
    assert sampled_by(out) == {"Heun, skipped layers blocks 0"}, "of blocks that it has"


SKIPPED = ["--set", "sample.guider=skip_layers:blocks=30+2", "--set", "sample.solver=heun"]


def sampled_by(rehearsal: Path) -> set[str]:
    """The ways, without their scales, by which the sweep made its images at CFG 3."""
    cells = json.loads((rehearsal / "sweep/scores.json").read_text())["cells"]
    return {cell["method"].partition(" scale")[0] for cell in cells if cell["cfg"] == 3}


@pytest.mark.parametrize(
    ("guider", "wanted"), [("auto:step=500", "auto:step=1"), ("skip_layers:blocks=30+2", "skip_layers:blocks=0")]
)
def test_a_rehearsal_guides_as_the_recipe_does(guider, wanted):
    """By what so small a run has: its first snapshot, its first block."""
    made = load_recipe("dedistill:flux_schnell_24gb", [f"sample.guider={guider}", "preview.every=0", "preview.prompts=[]"])
    small = shrink(made, run=Path("run"), model={}, data={}, small_images=True)
    assert small.sample.guider == wanted and small.snapshot.every == 1 <= small.train.steps


@pytest.mark.slow  # test_stages_and_what_they_leave has another way
def test_the_recipe_s_own_way_of_sampling(rehearse, tmp_path):
    """In the sweep; instead of a snapshot that so small a run has not, one that it has."""
    code, said = rehearse(
        "flux_schnell_24gb", "sample.guider=auto:step=500", "sample.solver=heun", "preview.every=0", "preview.prompts=[]"
    )
    assert code == 0, said
    assert sampled_by(tmp_path / "run-rehearsal") == {"Heun, autoguidance weak 0 step 1"}


@pytest.mark.parametrize("recipe", [name for name in OTHERS if not name.endswith("tiny")])
def test_adapters_of_recipes_fit_their_tiny_models(recipe, tmp_path):
    """Whose layers are narrower than many a rank."""
    made = load_recipe(ROOT / "dedistill" / "recipes" / f"{recipe}.toml")
    family = get_family(made.model.family)
    write_small_model(made, family, tmp_path, None)
    small = shrink(made, run=tmp_path / "run", model={"path": str(tmp_path)}, data={}, small_images=True)
    assert adapted_layers(small, family, family.full_size(small.model).denoiser)
    assert len(small.adapter.targets) == len(made.adapter.targets)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*FLUX, *OTHERS, *DIGITS])
def test_every_recipe_passes_in_ninety_seconds(rehearse, recipe):
    start = time.monotonic()
    code, said = rehearse(recipe)
    assert code == 0, said
    print(f"{recipe}: {time.monotonic() - start:.0f} s")


def uncaptioned(folder: Path) -> None:
    for i in range(12):
        Image.new("RGB", (1100, 1100), (20 * i, 0, 0)).save(folder / f"z{i:02}.png")
        if i != 11:
            (folder / f"z{i:02}.txt").write_text("a plain colour")


def small(folder: Path) -> None:
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    (folder / "a.txt").write_text("a black square")


def unreadable(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(b"no image")
    (folder / "a.txt").write_text("nothing")


DATA_FAULTS = [
    (uncaptioned, "1 image has no caption, e.g. "),
    (small, "no usable image; e.g. "),
    (unreadable, "not an image of a known format"),
    (lambda folder: None, "no usable image in"),
]


@pytest.mark.parametrize(("spoil", "message"), DATA_FAULTS, ids=["no caption", "too small", "no image", "empty folder"])
def test_faults_of_the_data(rehearse, tmp_path, spoil, message):
    """A caption is missed beyond the few images that are looked at, too."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    spoil(folder)
    code, said = rehearse("flux_schnell_24gb", f"data.sets=[{{path='{folder}'}}]")
    assert code != 0 and message in said and "Traceback" not in said, said
    assert "stage 'your images and captions'" in said


FAULTS = [
    (["train.stpes=3"], "train.stpes: unknown key, did you mean 'steps'"),
    (["adapter.targets=[{pattern='transformer_blocks.*.attn.q_proj'}]"], "matches no linear"),
    (["adapter.targets=[{pattern='transformer_blocks.19.**'}]"], "matches no linear"),
    (["adapter.targets=[{preset='mdoulation'}]"], "unknown preset 'mdoulation'"),
    (["base.exclude=['*.norm1']"], "matches no linear"),
    (["base.swap=58"], "base.swap: 58 blocks, and the network has 57"),
    (["train.gradient_checkpointing=60"], "train.gradient_checkpointing: 60 blocks, and the network has 57"),
    (["model.text_length=640"], "model.text_length: 640 tokens; flux takes at most 512"),
    (["model.guidance=1.0"], "model.guidance: this network has no guidance embedding"),
    (["snapshot.every=50000"], "snapshot.every: 50,000 is never reached; train.steps is 20,000"),
    (["validate.every=20001"], "validate.every: 20,001 is never reached"),
    (["snapshot.every=1"], "this run keeps"),  # 20,000 snapshots of .3 GB
]


@pytest.mark.parametrize(("settings", "message"), FAULTS, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_faults_of_the_recipe(rehearse, settings, message):
    code, said = rehearse("flux_schnell_24gb", *settings)
    assert code != 0 and message in said and "Traceback" not in said and "internal" not in said, said


def test_full_disk_is_caught(rehearse, small_disk, tmp_path):
    with small_disk(30_000):
        code, said = rehearse("flux_schnell_24gb")
    assert code != 0 and "cannot write" in said and str(tmp_path) in said and "internal" not in said, said
