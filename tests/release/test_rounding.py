"""What bf16 keeps of a small change: by a LoRA loader's arithmetic, by our measure of it, and as export and check say it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter_export import BLOCKS, snapshot

from dedistill.cli.main import main
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.release.export import check_file, export_model
from dedistill.release.rounding import SAMPLED, RoundingStats, relative_size


def drawn(kind: str, generator: torch.Generator) -> torch.Tensor:
    """A weight or a change [768, 768], spread evenly, normally, or as an adapter makes it."""
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {
        "uniform": lambda: torch.rand(768, 768, generator=generator) * 2 - 1,
        "normal": lambda: normal(768, 768),
        "lora": lambda: normal(768, 8) @ normal(8, 768),
        "lokr": lambda: torch.kron(torch.ones(4, 4), normal(192, 192)),
    }[kind]()


@pytest.mark.parametrize(("weights", "kept"), [("uniform", (0.38, 0.48)), ("normal", (0.50, 0.56))])
@pytest.mark.parametrize("change", ["normal", "lora", "lokr"])
@pytest.mark.parametrize("spread", [0.02, 0.018])
def test_what_a_loader_on_bf16_keeps(weights, kept, change, spread):
    """At 1e-3 of the weights .43 (evenly spread, as in a new network) to .52 (normal), at 3e-3 more than .9, at 1e-2 all."""
    generator = torch.Generator().manual_seed(1)
    weight, delta = (drawn(weights, generator) * spread).bfloat16(), drawn(change, generator)
    delta *= weight.float().norm() / delta.norm()

    def kept_of(size: float) -> float:
        """As ComfyUI does it: the sum in float32, rounded to the nearest; what the weights moved, along the change."""
        moved = (weight.float() + size * delta).to(torch.bfloat16).float() - weight.float()
        share = float((moved * delta).sum() / (size * delta.square().sum()))
        found = RoundingStats.measure(weight, (weight.float() + size * delta).bfloat16(), size * delta).facts()["kept"]
        assert found == pytest.approx(share, rel=1e-3)
        return share

    assert kept[0] < kept_of(1e-3) < kept[1]
    assert kept_of(1e-4) < 0.1 and 0.88 < kept_of(3e-3) < 0.95 and kept_of(1e-2) > 0.99


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes") / "tiny"
    write_tiny_flux(folder)
    return folder


def scaled(base, file, kind: str, size: float):
    """An adapter whose change is ``size`` of the weights of each of its layers."""
    weights = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    snapshot(base, file, kind, BLOCKS)
    tensors = load_file(file)
    for name in BLOCKS:
        key = "lycoris_" + name.replace(".", "_")
        f = {k.removeprefix(f"{key}."): t.double() for k, t in tensors.items() if k.startswith(f"{key}.")}
        delta = torch.kron(f["lokr_w1"], f["lokr_w2"]) if kind == "lokr" else f["lora_up.weight"] @ f["lora_down.weight"]
        factor = "lokr_w2" if kind == "lokr" else "lora_up.weight"
        tensors[f"{key}.{factor}"] = (f[factor] * size * weights[f"{name}.weight"].norm() / delta.norm()).float()
    save_file(tensors, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("kind", ["lokr", "lora"])
@pytest.mark.parametrize(("size", "small"), [(1e-3, True), (2.5e-3, True), (4e-3, False), (0.3, False)])
def test_export_and_check_say_how_large_an_adapter_is(kind, size, small, base, tmp_path, capsys):
    file = scaled(base, tmp_path / "a.safetensors", kind, size)
    assert (
        main(["export", str(file), "--format", "transformer", "--out", str(tmp_path / "out.safetensors"), "--model", str(base)])
        == 0
    )
    exported = capsys.readouterr().err
    assert main(["check", str(tmp_path / "out.safetensors"), "--model", str(base)]) == 0
    for said in (exported, capsys.readouterr().out):
        assert f"its change is {size:.2g} of the weights it is added to" in said
        found = re.search(r"LoRA loader that adds it into bf16 weights keeps (\d+)%", said)
        assert bool(found) == small == ("dedistill merge" in said and "fp32" in said and "strength" in said)
        if found and size == 1e-3:
            assert 30 < int(found[1]) < 80
    measured = check_file(file, base).size
    assert measured.share == pytest.approx(size, rel=1e-3) and measured.layers == len(BLOCKS)


def test_an_unknown_size_is_said_to_be_unknown(base, tmp_path, capsys):
    """Without --model, with a folder that has no weights, and with one that holds codes."""
    file = scaled(base, tmp_path / "a.safetensors", "lokr", 1e-3)
    (tmp_path / "bare" / "transformer").mkdir(parents=True)
    (tmp_path / "bare" / "transformer" / "config.json").write_bytes((base / "transformer" / "config.json").read_bytes())
    export_model(base, tmp_path / "int8", "int8")
    for model in (tmp_path / "bare", tmp_path / "int8"):
        assert check_file(file, model).size is None
        assert main(["check", str(file), "--model", str(model)]) == 0
        assert "is not known without them: name the base's folder with --model" in capsys.readouterr().out


def test_of_many_layers_some_are_measured():
    weights = {f"{i}.weight": torch.full((64, 64), 2.0**-i) for i in range(40)}
    layers = {
        str(i): {"lora_up.weight": weights[f"{i}.weight"][:, :1] / 4, "lora_down.weight": torch.ones(1, 64)} for i in range(40)
    }
    found = relative_size(layers, weights)
    assert found.share == pytest.approx(0.25) and found.kept == pytest.approx(1) and found.layers <= SAMPLED


def test_check_in_words_and_as_json(base, tmp_path, capsys):
    """One line that says what it is and who loads it, names that are not cut, what to use instead; the same as JSON, whole."""
    file = scaled(base, tmp_path / "a.safetensors", "lora", 0.1)
    assert main(["check", str(file), "--model", str(base)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{file}: LoRA of 3 layers; 3 of 7 programs load it whole: ComfyUI; LyCORIS; SimpleTuner")
    rows = {line.split("  ")[0]: line for line in said[3:] if not line.startswith(" ")}
    assert rows["kohya sd-scripts"].endswith("0 of 9  --format kohya")
    assert rows["diffusers, load_lora_weights"].endswith("0 of 9  --format transformer")
    assert any(re.fullmatch(r" +ignores lycoris_single_transformer_blocks_1_proj_mlp.\w+ and 8 more", line) for line in said)
    assert main(["check", str(file), "--model", str(base), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    programs = {v["program"]: v for v in told["verdicts"]}
    assert (told["kind"], told["layers"], told["fault"]) == ("LoRA", 3, "") and told["size"]["share"] == pytest.approx(
        0.1, rel=1e-3
    )
    assert programs["ComfyUI"]["whole"] and len(programs["ComfyUI"]["loaded"]) == 9
    assert len(programs["kohya sd-scripts"]["ignored"]) == 9 and programs["kohya sd-scripts"]["use"] == "--format kohya"
    with pytest.raises(SystemExit):
        main(["check", "dedistill:flux_dev", "--json"])
    save_file(load_file(file) | {"lycoris_x_embedder.dora_scale": torch.ones(1)}, file)
    assert main(["check", str(file), "--model", str(base)]) == 0
    said = capsys.readouterr().out
    assert "by the names of its tensors alone, " in said and "is a DoRA (tensor 'lycoris_x_embedder.dora_scale')" in said
