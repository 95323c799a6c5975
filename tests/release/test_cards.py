"""Model cards of every family: its own pipeline and licence, and code that runs as it stands. FLUX's more in test_export.py."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL.Image import Image
from test_merge import recipe_for

from dedistill.errors import UserError
from dedistill.models.registry import families, get_family, get_spec
from dedistill.release.card import write_card
from dedistill.release.export import export_model, formats_of

PIPELINES = {
    "flux": "FluxPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}
PUBLISHED = [(name, base) for name in PIPELINES if name != "flux" for base in get_spec(name).published]


def written(folder: Path, name: str, format: str, facts: dict[str, Any], base: str | None = None) -> tuple[dict, str]:
    """Front matter and text of a card for a network of full size."""
    spec = get_spec(name)
    assert spec.full_config
    write_card(folder, "mine", format, spec.full_config(base or "", False), spec, facts, "somewhere", base=base)
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def code(text: str) -> str:
    (block,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    return block


def test_every_family_of_published_pipelines_has_one():
    assert PIPELINES.keys() == {name for name in families() if get_spec(name).card}


@pytest.mark.parametrize(("name", "base"), PUBLISHED, ids=lambda value: getattr(value, "id", value))
def test_name_and_licence_are_the_models_own(name, base, tmp_path):
    front, text = written(tmp_path, name, "single", {"family": name}, base.id)
    assert (front["base_model"], front["license"], front["library_name"]) == (base.id, base.licence.id, "diffusers")
    assert front.get("license_name", "") == base.licence.name and front.get("license_link", "") == base.licence.link
    assert (
        text.startswith("\n# mine\n")
        and f"`{base.id}`" in text
        and (not base.licence.link or f"]({base.licence.link})" in text)
    )
    assert not [known.id for _, known in PUBLISHED if known is not base and f"`{known.id}`" in text]


@pytest.mark.parametrize("claimed", ["stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large"])
def test_another_base_than_that_of_the_weights_is_refused(claimed, tmp_path):
    """Large where the folder's name says turbo, and medium for a network that is large."""
    facts = {"base": {"path": "models/stable-diffusion-3.5-large-turbo" if claimed.endswith("large") else "mine"}}
    config = get_spec("sd3").full_config("stabilityai/stable-diffusion-3.5-large", False)
    with pytest.raises(UserError, match=f"--base {claimed}: this model goes back to stabilityai/stable-diffusion-3.5-large"):
        write_card(tmp_path, "t", "single", config, get_spec("sd3"), facts, "somewhere", base=claimed)


@pytest.mark.parametrize(("name", "format"), [(name, format) for name in PIPELINES for format in formats_of(get_spec(name))])
@pytest.mark.parametrize("facts", [{}, {"prediction": "v", "null": "empty"}, {"prediction": "velocity", "null": "zeros"}])
def test_code_of_cards_compiles_and_names_what_is_there(name, format, facts, tmp_path):
    _, text = written(tmp_path, name, format, facts)
    if "```" in text:
        compile(code(text), "card", "exec")
    assert ("mine.safetensors" in text) == (format in ("single", "bfl")) and "Other programs do not know" not in text
    if name in ("sd15", "sdxl"):
        assert ("`v_prediction`" in text) == (facts.get("prediction") == "v")
        assert ("*ModelSamplingSD3*" in text) == (facts.get("prediction") == "velocity")
        assert ('`negative_prompt=""`' in text) == (facts.get("null") == "empty")


@pytest.mark.parametrize("name", PIPELINES)
def test_code_of_cards_makes_an_image(name, tmp_path, monkeypatch):
    """Of a model that this family saved and exported; in two steps, of 64 pixels."""
    family = get_family(name)
    table = recipe_for(tmp_path / "a", tmp_path / "base", name).model
    family.write_tiny(table, tmp_path / "base", None, full_depth=False)
    family.save(family.load(table, seed=0), tmp_path / "saved")
    export_model(tmp_path / "saved", tmp_path / "mine", "diffusers")
    found = code((tmp_path / "mine/README.md").read_text()).replace("steps = 28", "steps = 2").replace("steps=28", "steps=2")
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {}
    exec(re.sub(r'"a red house on the moon"', '"a red house", height=64, width=64', found), said)
    assert isinstance(said["image"], Image) and said["image"].size == (64, 64)
    assert PIPELINES[name] in type(said["pipe"]).__name__
