"""What a network predicts is said wherever its weights go, and what it made: snapshot, adapter, folder, single file, pairs."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from test_merge import recipe_for, trained

from dedistill.data.digits import load_digits
from dedistill.flow.schedule import ABOVE
from dedistill.models.family import prediction_facts
from dedistill.models.registry import families, get_family, get_spec
from dedistill.models.unet.tiny import write_tiny_unet
from dedistill.release.export import export_adapter, export_model
from dedistill.release.folder import read_facts
from dedistill.release.merge import merge_adapter
from dedistill.runs.model import snapshot_header
from dedistill.sampling.pairs import make_pairs
from dedistill.sampling.sampler import Sampling

MODELS = [*((name, get_spec(name).prediction) for name in families()), ("sd15", "v")]


def header(file) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize(("name", "prediction"), MODELS)
def test_every_file_says_what_is_predicted(name, prediction, tmp_path):
    family, base = get_family(name), tmp_path / "base"
    small = "" if name == "pixel_flux" else "[sample]\nheight = 64\nwidth = 64"
    recipe = recipe_for(tmp_path / "a", base, name, "lora", small)
    if prediction == "v":
        write_tiny_unet(base, family.spec.full_config("", False), prediction="v_prediction")
    else:
        family.write_tiny(recipe.model, base, None, full_depth=False)
    file = tmp_path / "a.safetensors"
    model = trained(recipe, file)
    schedule = model.components.schedule
    save_file(model.tensors(), file, metadata=snapshot_header(recipe, 7, prediction_facts(family.spec, model.components)))
    merge_adapter(recipe, file, tmp_path / "merged")
    export_model(tmp_path / "merged", tmp_path / "single", "single")
    export_adapter(file, tmp_path / "own.safetensors", "lycoris", base)
    pairs = make_pairs(
        model,
        load_digits(0.0),
        tmp_path / "pairs",
        teacher="x",
        count=1,
        sampling=Sampling(steps=1),
        points=1,
        seed=0,
        shard_size=1,
    )

    headers = [header(f) for f in (file, tmp_path / "own.safetensors", tmp_path / "single/single.safetensors")]
    assert [h["dedistill.prediction"] for h in headers] == [prediction] * 3
    assert [h["modelspec.prediction_type"] for h in headers[1:]] == [prediction] * 2
    assert [facts["prediction"] for facts in (read_facts(tmp_path / "merged"), pairs)] == [prediction] * 2
    if schedule:
        told = json.loads(headers[2]["dedistill.facts"])
        for facts in (told, read_facts(tmp_path / "merged"), pairs):
            assert facts["sigma_range"] == pytest.approx([0.028341, 0.935958], abs=1e-6) and facts["above_range"] == ABOVE
        assert headers[0]["dedistill.above_range"] == ABOVE
