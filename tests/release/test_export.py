"""Exports: every format read back by its reader gives the same network; headers and cards say what they must."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from by_file import tool
from diffusers import FluxPipeline, FluxTransformer2DModel
from original_files import as_original
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dedistill.errors import UserError
from dedistill.models.flux import SPEC as FLUX
from dedistill.models.flux.loading import load_transformer
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.flux.published import DEV, PUBLISHED, base_of
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.models.quantize import QuantizedLinear, prepare_base
from dedistill.models.registry import licence_for
from dedistill.models.spec import APACHE, UNKNOWN, Licence
from dedistill.release.card import write_card
from dedistill.release.export import export_model, load_int8
from dedistill.release.folder import Denoiser

ROOT = Path(__file__).parent.parent.parent
SCHNELL, DEVELOPED, FLEX = (
    {"guidance_embeds": guidance, "num_layers": layers} for guidance, layers in ((False, 19), (True, 19), (True, 8))
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A whole tiny pipeline, as merged from an adapter that was trained with a mask."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_flux(folder, layers=2, single_layers=3)
    merge = {"adapter_header": {"dedistill.step": "9"}, "dtype": "bf16", "rounding": "stochastic", "kept": 1.0003}
    merge["recipe"] = '[model]\nmask = "bool"\n[adapter]\nkind = "lokr"\n[train]\nlr = 1e-4\n'
    facts = {"family": "flux", "mask": "bool", "base": {"path": "black-forest-labs/FLUX.1-schnell"}, "merges": [merge]}
    (folder / "dedistill.json").write_text(json.dumps(facts))
    return folder


@torch.no_grad()
def answer(denoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    ids = torch.zeros(6, 3)
    ids[:, 2] = torch.arange(6)
    return denoiser(
        draw(2, 6, 64), draw(2, 5, 32), draw(2, 32), torch.tensor([0.2, 0.7]), ids, torch.zeros(5, 3), return_dict=False
    )[0]


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as f:
        return f.metadata()


def card(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_diffusers_folder_is_a_whole_pipeline(base, tmp_path):
    """Shards with an index; FluxPipeline loads the folder, its network gives the same answers."""
    export_model(base, tmp_path / "out", "diffusers", shard_bytes=100_000)
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    pipe = FluxPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert torch.equal(answer(pipe.transformer), answer(FluxTransformer2DModel.from_pretrained(base / "transformer")))
    for part in ("vae/diffusion_pytorch_model.safetensors", "tokenizer_2/tokenizer.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "out" / part).read_bytes() == (base / part).read_bytes()


def test_a_folder_that_points_to_its_encoders_is_made_whole(base, tmp_path):
    """A trained folder names the place of its encoders; a release contains them."""
    (tmp_path / "short").mkdir()
    shutil.copytree(base / "transformer", tmp_path / "short" / "transformer")
    facts = {"family": "flux", "components": str(base)}
    (tmp_path / "short" / "dedistill.json").write_text(json.dumps(facts))
    export_model(tmp_path / "short", tmp_path / "out", "diffusers")
    FluxPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert "components" not in json.loads((tmp_path / "out" / "dedistill.json").read_text())
    (tmp_path / "short" / "dedistill.json").write_text(json.dumps({**facts, "components": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone"):
        export_model(tmp_path / "short", tmp_path / "out2", "diffusers")
    assert not list(tmp_path.glob("out2*"))


def test_single_file_has_every_tensor_and_says_what_it_is(base, tmp_path):
    """Diffusers' names; ModelSpec's required keys, strings only."""
    export_model(base, tmp_path / "single", "single")
    file = tmp_path / "single" / "single.safetensors"
    tensors, denoiser = load_file(file), Denoiser(base)
    assert tensors.keys() == denoiser.layout.keys() and all(torch.equal(tensors[n], denoiser[n]) for n in tensors)
    said = header(file)
    required = {"sai_model_spec", "architecture", "implementation", "title", "resolution"}
    assert {f"modelspec.{key}" for key in required} <= said.keys() and said["format"] == "pt"
    assert said["modelspec.architecture"] == "flux-1-schnell" and said["modelspec.license"] == "apache-2.0"
    assert said["dedistill.masked_attention"] == "bool" and said["dedistill.guidance"] == "none"


def test_bfl_file_joins_what_bfl_fuses(base, tmp_path):
    """The streamed file equals the names and tensors of the map that diffusers' reader inverts."""
    export_model(base, tmp_path / "bfl", "bfl")
    found, wanted = load_file(tmp_path / "bfl" / "bfl.safetensors"), as_original(naming, dict(Denoiser(base).items()))
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("format", ["single", "bfl"])
def test_a_file_we_wrote_is_a_base_again(format, base, tmp_path):
    """model.path takes either single file, with the encoders of the folder it came from."""
    export_model(base, tmp_path / format, format)
    denoiser = load_transformer(tmp_path / format / f"{format}.safetensors", base)
    assert torch.equal(answer(denoiser), answer(FluxTransformer2DModel.from_pretrained(base / "transformer")))


def test_int8_export_is_our_int8_base(base, tmp_path):
    """Codes and answers equal those of quantizing the loaded network; what is excluded stays as it was."""
    export_model(base, tmp_path / "int8", "int8", exclude=["proj_out", "**.norm1.linear"])
    denoiser = FluxTransformer2DModel.from_pretrained(base / "transformer")
    prepare_base(denoiser, "int8", ["proj_out", "**.norm1.linear"], "cpu")
    again = load_int8(tmp_path / "int8")
    assert isinstance(again.x_embedder, QuantizedLinear) and not isinstance(again.proj_out, QuantizedLinear)
    assert torch.equal(answer(again), answer(denoiser)) and not any(p.requires_grad for p in again.parameters())
    pipe = FluxPipeline.from_pretrained(tmp_path / "int8", transformer=again, local_files_only=True)
    assert pipe.transformer is again
    with pytest.raises(UserError, match="int8 export already"):
        export_model(tmp_path / "int8", tmp_path / "out", "bfl")
    with pytest.raises(UserError, match="matches no linear"):
        export_model(base, tmp_path / "out", "int8", exclude=["no.such"])


def test_a_damaged_folder_is_refused_by_tensor(base, tmp_path):
    for change, match in (
        ("drop", "misses 1 tensor.*x_embedder"),
        ("add", "does not know 1 tensor.*extra"),
        ("turn", "1 tensor is of another shape than config.json says, e.g. 'x_embedder.weight'"),
        ("cut", "safetensors"),
    ):
        folder = tmp_path / change
        shutil.copytree(base, folder)
        file = next((folder / "transformer").glob("*.safetensors"))
        tensors = load_file(file)
        if change == "drop":
            del tensors["x_embedder.weight"]
        if change == "turn":
            tensors["x_embedder.weight"] = tensors["x_embedder.weight"].T.contiguous()
        if change == "add":
            tensors["extra"] = torch.ones(1)
        raw = file.read_bytes()
        file.unlink()
        save_file(tensors, file) if change != "cut" else file.write_bytes(raw[:-10])
        with pytest.raises(UserError, match=match):
            export_model(folder, tmp_path / "out", "single")
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "value"), [("proj_out.bias", float("inf")), ("transformer_blocks.1.attn.to_k.weight", float("nan"))]
)
@pytest.mark.parametrize("format", ["diffusers", "single", "bfl", "int8"])
def test_weights_that_are_not_finite_are_not_released(name, value, format, base, tmp_path):
    shutil.copytree(base, tmp_path / "broken")
    file = tmp_path / "broken" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"broken': tensor '{name}' holds numbers that are not finite"):
        export_model(tmp_path / "broken", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "config", "licence"),
    [
        ("black-forest-labs/FLUX.1-schnell", SCHNELL, APACHE),
        ("/models/FLUX.1-schnell", SCHNELL, APACHE),
        ("ostris/Flex.1-alpha", FLEX, APACHE),
        ("jimmycarter/LibreFLUX", SCHNELL, APACHE),
        ("black-forest-labs/FLUX.1-dev", DEVELOPED, DEV),
        ("models--black-forest-labs--FLUX.1-Redux-dev", DEVELOPED, DEV),
        ("somewhere", DEVELOPED, DEV),
        ("black-forest-labs/FLUX.1-dev", FLEX, DEV),
        ("somewhere", SCHNELL, UNKNOWN),
    ],
)
def test_licences(source, config, licence):
    """From the name, or from a guidance embedding where the name tells nothing; dev is never given away."""
    base = base_of(PUBLISHED, source, config)
    assert licence_for(base, None) == licence
    if licence == DEV:
        with pytest.raises(UserError, match="non-commercial"):
            licence_for(base, "apache-2.0")
    else:
        assert licence_for(base, "mit") == Licence("mit")


def test_a_name_that_contradicts_the_network_is_refused():
    with pytest.raises(UserError, match="guidance embedding"):
        base_of(PUBLISHED, "black-forest-labs/FLUX.1-schnell", DEVELOPED)
    assert len({b.id for b in PUBLISHED}) == len(PUBLISHED)


def test_cards(base, tmp_path):
    """Front matter, usage, padding, training, licence; provenance outweighs what the user says."""
    export_model(base, tmp_path / "out", "single")
    front, text = card(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert front["license"] == "apache-2.0" and front["base_model"] == "black-forest-labs/FLUX.1-schnell"
    assert front["library_name"] == "diffusers" and front["base_model_relation"] == "finetune" and "lokr" in front["tags"]
    assert "T5TokenizerOptions" in text and "`min_padding` 0" in text and "`min_length` 0" in text
    assert "| train.lr | 0.0001 |" in text and "100.0 % of the change kept" in text and "| weights of step | 9 |" in text
    with pytest.raises(UserError, match=r"goes back to black-forest-labs/FLUX\.1-schnell"):
        export_model(base, tmp_path / "no", "single", base="ostris/OpenFLUX.1")

    def written(config: dict, facts: dict, **terms) -> dict:
        write_card(tmp_path, "t", "diffusers", config, FLUX, facts, "somewhere", **terms)
        return card(tmp_path)

    dev = written(DEVELOPED, {"guidance": "1.0"})
    assert dev["license"] == "other" and dev["license_name"] == DEV.name and dev["license_link"] == DEV.link
    assert dev["base_model"] == "black-forest-labs/FLUX.1-dev"
    text = (tmp_path / "README.md").read_text()
    assert "use guidance_scale = 1.0" in text and "guidance_scale=1.0, num_inference_steps" in text
    for told, said in (({}, "does not say what it was fed"), ({"guidance": "bypassed"}, "was bypassed in training")):
        written(DEVELOPED, told)
        assert said in (text := (tmp_path / "README.md").read_text()) and "guidance_scale" not in text
    with pytest.raises(UserError, match=r"cannot be released as 'apache-2\.0'"):
        written(SCHNELL, {"base": {"path": "black-forest-labs/FLUX.1-dev"}}, licence="apache-2.0")
    plain = written(SCHNELL, {})
    assert plain["license"] == "unknown" and "base_model" not in plain
    assert "T5TokenizerOptions" not in (tmp_path / "README.md").read_text()
    assert written(SCHNELL, {}, base="black-forest-labs/FLUX.1-schnell", licence="mit")["license"] == "mit"


@pytest.mark.parametrize("format", ["diffusers", "single", "bfl", "int8"])
def test_python_in_cards_compiles(format, base, tmp_path):
    export_model(base, tmp_path / "out", format)
    text = (tmp_path / "out" / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert bool(blocks) == (format != "single")
    for block in blocks:
        compile(block, "card", "exec")


def test_tool(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert tool("export_model", base, "--format", "peft", "--out", out) == 2
    assert "is a model folder: --format is one of diffusers" in capsys.readouterr().err
    assert tool("export_model", tmp_path / "none", "--format", "bfl", "--out", out) == 2
    assert tool("export_model", base, "--format", "bfl", "--out", out) == 0 and (out / "out.safetensors").exists()
    assert tool("export_model", base, "--format", "bfl", "--out", out) == 1
    assert "already exists" in capsys.readouterr().err
