"""One shift for all that makes images, ``sample.shift``, up to the scheduler that others sample by; another for training."""

import json
from dataclasses import replace

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from test_merge import alone, recipe_for, trained

from dedistill.cli.main import main
from dedistill.data.digits import load_digits
from dedistill.data.encode import open_data
from dedistill.errors import UserError
from dedistill.evaluation.candidates import candidates_of
from dedistill.flow.guidance import guider_of
from dedistill.flow.path import dynamic_shift
from dedistill.flow.solvers import sigma_grid
from dedistill.models.flux.pipeline import MaskedFluxPipeline
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.models.model import build_model
from dedistill.models.registry import get_family
from dedistill.objectives.base import objective_for
from dedistill.recipe import to_toml
from dedistill.recipe.resolve import as_it_was_meant, shift_note
from dedistill.release.export import export_adapter, export_model
from dedistill.release.merge import merge_adapter
from dedistill.sampling.sampler import Sampling, sample, start_noise

SIDE = 64
TOKENS = (SIDE // 16) ** 2
DEV = dynamic_shift(TOKENS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A schnell, whose scheduler has shift 1, and a dev, whose shift grows with the tokens."""
    folder = tmp_path_factory.mktemp("bases")
    write_tiny_flux(folder / "schnell")
    write_tiny_flux(folder / "dev", guidance=True)
    return folder


def recipe(bases, tmp_path, base="schnell", more="", **said):
    text = f"{more}\n[sample]\nheight = {SIDE}\nwidth = {SIDE}\n" + (f"shift = {said['sample']}\n" if "sample" in said else "")
    text += f"[timesteps]\nshift = {said['timesteps']}\n" if "timesteps" in said else ""
    return recipe_for(tmp_path, bases / base, "flux", "lora", text)


def scheduler(folder) -> dict:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


@pytest.mark.parametrize(
    ("base", "said", "images", "training"),
    [
        ("schnell", {}, 1.0, 1.0),
        ("schnell", {"timesteps": 3.0}, 1.0, 3.0),
        ("schnell", {"timesteps": 3.0, "sample": 2.5}, 2.5, 3.0),
        ("dev", {}, DEV, 1.0),
        ("dev", {"timesteps": '"auto"'}, DEV, DEV),
        ("dev", {"timesteps": '"auto"', "sample": 1.0}, 1.0, DEV),
        ("dev", {"sample": '"auto"', "timesteps": 2.0}, DEV, 2.0),
    ],
)
def test_images_and_training_each_have_their_own(base, said, images, training, bases, tmp_path):
    model = build_model(recipe(bases, tmp_path, base, **said))
    assert model.grid_shift == pytest.approx(images)
    objective = objective_for(recipe(bases, tmp_path, base, **said), load_digits(0.0), model.shift)
    assert objective.shift_of(model.components.sample_shape) == pytest.approx(training)


def test_a_family_without_schedulers_has_shift_1_and_its_rule_for_auto(tmp_path):
    base = tmp_path / "base"
    get_family("pixel_flux").write_tiny(type("Spec", (), {"path": "tiny", "revision": None}), base, None, full_depth=False)
    assert build_model(recipe_for(tmp_path / "a", base, more="[timesteps]\nshift = 3.0")).grid_shift == 1.0
    assert build_model(recipe_for(tmp_path / "b", base, more='[sample]\nshift = "auto"')).grid_shift not in (1.0, 3.0)


def euler(folder, steps: int) -> np.ndarray:
    """Sigmas of the pipeline in ``folder``."""
    pipe = MaskedFluxPipeline.from_pretrained(folder, transformer=None)
    pipe._timesteps(steps, None, TOKENS)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    return pipe.scheduler.sigmas.double().numpy()


@pytest.mark.parametrize(("base", "shift"), [("schnell", 3.0), ("schnell", None), ("dev", 2.0), ("dev", None), ("dev", 1.0)])
def test_what_is_exported_samples_as_previews_and_sweeps_did(base, shift, bases, tmp_path):
    """The exported pipeline's own sigmas are those of the solver; the release says the shift; what is trained on it has it."""
    said = {"timesteps": 1.5} | ({"sample": shift} if shift else {})
    own = recipe(bases, tmp_path / "a", base, **said)
    model = trained(own, tmp_path / "a.safetensors", size=1e-2)
    merge_adapter(own, tmp_path / "a.safetensors", tmp_path / "merged", dtype="fp32")
    said: list[str] = []
    export_model(tmp_path / "merged", tmp_path / "out", "diffusers", say=said.append)
    for steps in (1, 4, 9):
        np.testing.assert_allclose(euler(tmp_path / "out", steps), sigma_grid(steps, model.grid_shift), atol=2e-7)
    config = scheduler(tmp_path / "out")
    assert config == (scheduler(bases / base) if shift is None else config | {"shift": shift, "use_dynamic_shifting": False})
    facts = [json.loads((tmp_path / name / "dedistill.json").read_text())["shift"] for name in ("merged", "out")]
    assert facts == [shift or "auto"] * 2
    assert len([line for line in said if line.startswith("timesteps.shift = 1.5 in training, and sample.shift = ")]) == 1
    export_model(tmp_path / "merged", tmp_path / "single", "single")
    with safe_open(tmp_path / "single" / "single.safetensors", framework="pt") as f:
        assert f.metadata()["dedistill.shift"] == str(shift or "auto")
    size = f"[sample]\nheight = {SIDE}\nwidth = {SIDE}"
    again = build_model(recipe_for(tmp_path / "b", tmp_path / "merged", "flux", "lora", size))
    assert again.grid_shift == pytest.approx(model.grid_shift), "a merged model has the scheduler that its images were made by"


def test_the_exported_pipeline_makes_the_sweeps_image(bases, tmp_path):
    own = recipe(bases, tmp_path / "a", timesteps=1.5, sample=3.0)
    trained(own, tmp_path / "a.safetensors", size=1e-2)
    merge_adapter(own, tmp_path / "a.safetensors", tmp_path / "merged", dtype="fp32")
    export_model(tmp_path / "merged", tmp_path / "out", "diffusers")
    model, noise = alone(own, tmp_path / "merged"), start_noise(0, 1, (16, SIDE // 8, SIDE // 8))
    image = sample(model, ["a fox"], noise, Sampling(steps=3))
    pipe = MaskedFluxPipeline.from_pretrained(tmp_path / "out")
    packed = pipe._pack_latents(noise, *noise.shape)
    options = {"latents": packed, "height": SIDE, "width": SIDE, "num_inference_steps": 3, "output_type": "pt"}
    made = pipe("a fox", true_cfg_scale=1.0, **options).images
    plain = sample(replace(model, grid_shift=1.5), ["a fox"], noise, Sampling(steps=3))
    off = [float((made - (either.clamp(-1, 1) + 1) / 2).abs().max()) for either in (image, plain)]
    assert off[0] < 1e-5 < 1e-4 < off[1]
    seen = [made]
    for guider in ("cfg", "interval:low=0.8,high=1", "rescale", "apg", "zero_star", "skip_layers:blocks=1,stop=0.9"):
        image = sample(model, ["a fox"], noise, Sampling(steps=3, guidance=guider_of(guider, 4.0)))
        made = pipe("a fox", true_cfg_scale=4.0, guider=guider, **options).images
        assert float((made - (image.clamp(-1, 1) + 1) / 2).abs().max()) < 2e-5, guider
        assert all(float((made - other).abs().max()) > 1e-4 for other in seen), guider
        seen.append(made)


def test_a_whole_network_is_saved_with_its_shift(bases, tmp_path):
    own = recipe(bases, tmp_path, sample=2.0).model_copy(update={"adapter": None})
    model = build_model(own)
    model.family.save(model.components, tmp_path / "saved")
    assert scheduler(tmp_path / "saved")["shift"] == 2.0


def test_an_adapter_says_it_too(bases, tmp_path):
    own = recipe(bases, tmp_path / "a", timesteps=3.0)
    tensors, header = trained(own, tmp_path / "own.safetensors").tensors(), {"dedistill.recipe": to_toml(own)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=header)
    said: list[str] = []
    export_adapter(tmp_path / "a.safetensors", tmp_path / "out.safetensors", "peft", bases / "schnell", said.append)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as f:
        assert f.metadata()["dedistill.shift"] == "auto"
    assert "timesteps.shift = 3 in training, and sample.shift = auto (the model's own, 1)" in "".join(said)


@pytest.mark.parametrize(
    ("base", "said", "note"),
    [
        ("schnell", {}, ""),
        ("schnell", {"timesteps": '"auto"'}, ""),
        ("schnell", {"timesteps": 3.0}, "timesteps.shift = 3 in training, and sample.shift = auto (the model's own, 1) in"),
        ("schnell", {"timesteps": 3.0, "sample": 3.0}, ""),
        ("schnell", {"timesteps": '"auto"', "sample": 1.0}, ""),
        ("dev", {}, "timesteps.shift = 1 in training, and sample.shift = auto (the model's own) in previews"),
        ("dev", {"timesteps": '"auto"'}, ""),
        ("dev", {"timesteps": '"auto"', "sample": 3.0}, "timesteps.shift = auto (the model's own) in training, and"),
    ],
)  # fmt: skip
def test_the_plan_says_a_difference_once(base, said, note, bases, tmp_path, capsys):
    recipe(bases, tmp_path, base, **said)
    main(["plan", str(tmp_path / "recipe.toml"), "--no-forecast"])  # which refuses digits for this network, as a start does
    out = capsys.readouterr().out
    assert out.count("sample.shift") == (1 if note else 0) and note in out


def test_published_models_are_known_without_their_files(capsys):
    for name, noted in (("flux_schnell", False), ("openflux", False), ("flux_dev", False), ("flex1_alpha", False)):
        main(["plan", f"dedistill:{name}", "--no-forecast"])
        assert ("sample.shift" in capsys.readouterr().out) == noted, name
    main(["plan", "dedistill:flux_schnell", "--no-forecast", "--set", "timesteps.shift=3"])
    assert "sample.shift = auto (the model's own, 1)" in capsys.readouterr().out


def test_notes_of_numbers():
    one = lambda: 1.0  # noqa: E731
    assert shift_note(1.0, "auto", one) == shift_note("auto", 1.0, one) == shift_note(2.0, 2.0, one) == ""
    assert shift_note("auto", "auto", lambda: None) == shift_note("auto", None, lambda: None) == ""
    assert shift_note(3.0, "auto", lambda: None) and shift_note("auto", 3.0, one) and shift_note(1.0, 2.0, one)


def test_without_a_scheduler_both_need_numbers(bases, tmp_path):
    write_tiny_flux(tmp_path / "base")
    (tmp_path / "base" / "scheduler" / "scheduler_config.json").unlink()
    for said in ({}, {"sample": 2.0, "timesteps": '"auto"'}):
        own = recipe(tmp_path, tmp_path / "a", "base", **said)
        with pytest.raises(UserError, match=r"scheduler_config.json', which is missing.*\(timesteps.shift, sample.shift\)"):
            open_data(own.model_copy(update={"data": own.data.model_copy(update={"source": "pictures"})}), "cpu", print)
    own = recipe(tmp_path, tmp_path / "b", "base", sample=2.0)
    assert build_model(own).grid_shift == 2.0
    trained(own, tmp_path / "a.safetensors")
    merge_adapter(own, tmp_path / "a.safetensors", tmp_path / "merged")
    assert scheduler(tmp_path / "merged") == {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 2.0,
        "use_dynamic_shifting": False,
    }


def test_cells_of_another_shift_are_other_cells(bases, tmp_path):
    """By the recipe's key, and by the scheduler where that decides; that of training has no part in an image."""
    write_tiny_flux(tmp_path / "base")

    def identity(**said) -> str:
        return candidates_of(recipe(tmp_path, tmp_path / "a", "base", **said), ["base"])[0].weights

    (tmp_path / "a").mkdir()
    first = identity()
    assert identity(timesteps=3.0) == first == identity(sample='"auto"') != identity(sample=3.0)
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"shift": 1.0', '"shift": 2.0'))
    assert identity() != first


def test_cells_of_a_base_that_was_moved_are_the_same(tmp_path):
    """By its bytes, wherever it and what is around it lie; of another base they are others."""
    write_tiny_flux(tmp_path / "base")
    write_tiny_flux(tmp_path / "other", seed=5)

    def identity(base: str) -> str:
        return candidates_of(recipe(tmp_path, tmp_path / "a", base), ["base"])[0].weights

    (tmp_path / "a").mkdir()
    first = identity("base")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert identity("elsewhere") == first != identity("other")


def test_runs_of_before_had_one_shift_for_both(bases, tmp_path):
    """A recorded recipe without sample.shift made its images at that of training: a continued run is told of the difference."""
    own = recipe(bases, tmp_path, timesteps=3.0)
    recorded = own.resolved()
    del recorded["sample"]["shift"]
    assert as_it_was_meant(recorded, own.model)["sample"]["shift"] == 3.0
