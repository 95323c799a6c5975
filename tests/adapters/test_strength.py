"""The strength of a LoRA whose alpha stands in its header: PEFT's own, by PEFT itself."""

import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from dedistill.adapters.delta import weight_change
from dedistill.adapters.files import read_tensors
from dedistill.adapters.formats import by_layer
from dedistill.errors import UserError

LINEARS = ("blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q", "blocks.1.to_k", "proj_out")


def network() -> nn.Module:
    torch.manual_seed(0)
    block = lambda: nn.ModuleDict({"to_q": nn.Linear(12, 16), "to_k": nn.Linear(12, 8)})  # noqa: E731
    return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "proj_out": nn.Linear(12, 12)})


def saved(config: LoraConfig, prefix: str) -> tuple[dict, dict, dict]:
    """(tensors, header, change of weight by PEFT) of a LoRA as diffusers saves it."""
    denoiser = inject_adapter_in_model(config, network(), "x")
    layers = {name: m for name, m in denoiser.named_modules() if hasattr(m, "lora_A")}
    tensors = {}
    for name, m in layers.items():
        nn.init.normal_(m.lora_B["x"].weight)
        tensors |= {f"transformer.{name}.lora_{x}.weight": getattr(m, f"lora_{x}")["x"].weight.detach() for x in "AB"}
    table = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps({prefix + k: v for k, v in table.items()})}
    return tensors, header, {name: m.get_delta_weight("x").detach() for name, m in layers.items()}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 16},
        {"r": 4, "lora_alpha": 1, "use_rslora": True},
        {"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 12}},
        {"r": 2, "lora_alpha": 3, "rank_pattern": {r"blocks\.\d\.to_k": 6, "proj_out": 1}, "alpha_pattern": {"^proj_out": 5}},
        {"r": 2},
    ],
)
def test_it_is_what_peft_applies(options, prefix):
    tensors, header, wanted = saved(LoraConfig(target_modules=["to_q", "to_k", "proj_out"], **options), prefix)
    layers = by_layer(tensors, LINEARS, "file", header=header)
    assert layers.keys() == wanted.keys() == set(LINEARS)
    for name in layers:
        torch.testing.assert_close(weight_change(layers[name]), wanted[name], rtol=1e-5, atol=1e-6)


TENSORS = {"transformer.proj_out.lora_A.weight": torch.ones(2, 12), "transformer.proj_out.lora_B.weight": torch.ones(12, 2)}
LOKR = {"transformer.proj_out.lokr_w1": torch.ones(3, 3), "transformer.proj_out.lokr_w2": torch.ones(4, 4)}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (TENSORS, "[1]", "cannot be read as JSON: an object was expected"),
        (TENSORS, "[" * 100_000, "nested too deeply"),
        (TENSORS, '{"transformer.lora_alpha": "much", "transformer.r": 2}', "lora_alpha or alpha_pattern"),
        (TENSORS, '{"transformer.lora_alpha": 2, "transformer.r": 2, "transformer.alpha_pattern": [3]}', "alpha_pattern"),
        (TENSORS, '{"transformer.lora_alpha": 1%s, "transformer.r": 2}' % ("0" * 400), "lora_alpha or alpha_pattern"),
        (TENSORS, '{"transformer.lora_alpha": 2, "transformer.r": 8}', "'proj_out' has rank 2, and rank 8 by its header"),
        (TENSORS, '{"transformer.r": 2, "transformer.use_dora": true}', "is a DoRA"),
        (TENSORS | {"transformer.proj_out.alpha": torch.tensor(2.0)}, '{"lora_alpha": 4, "r": 2}', "2 by its tensor and 4"),
        (TENSORS, '{"r": 2, "rank_pattern": {"((p|q)+)+x": 2}}', "rank_pattern in its header .* may take for ever"),
        (TENSORS, '{"r": 2, "alpha_pattern": {".*.*.*.*.*x": 2}}', "alpha_pattern in its header .* may take for ever"),
        (TENSORS, json.dumps({"r": 2, "alpha_pattern": {f"x{i}": 2 for i in range(10_001)}}), "more than 10,000 patterns"),
        (TENSORS, '{"r": 2, "rank_pattern": {"(": 2}}', "rank_pattern in its header .* cannot be read"),
        (LOKR, '{"transformer.alpha": 16, "transformer.r": 4}', "scales the LoKr of 'proj_out' by 16 / 4"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(tensors, config, message):
    with pytest.raises(UserError, match=message) as refused:
        by_layer(tensors, LINEARS, "my.safetensors", header={"lora_adapter_metadata": config})
    assert "my.safetensors" in str(refused.value)


def test_what_a_header_says_of_other_networks_and_of_equal_alphas_changes_nothing():
    for config in ('{"text_encoder.lora_alpha": 64, "text_encoder.r": 2}', '{"lora_alpha": 2, "r": 2}', "{}"):
        (layer,) = by_layer(TENSORS, LINEARS, "file", header={"lora_adapter_metadata": config}).values()
        assert float(weight_change(layer)[0, 0]) == 2
    (layer,) = by_layer(LOKR, LINEARS, "file", header={"lora_adapter_metadata": '{"alpha": 4, "r": 4}'}).values()
    assert float(weight_change(layer)[0, 0]) == 1


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_is_not_finite_is_refused_by_its_tensor(tmp_path, value, dtype):
    tensors = {name: t.to(dtype).clone() for name, t in TENSORS.items()}
    tensors["transformer.proj_out.lora_B.weight"][3, 1] = value
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"'transformer.proj_out.lora_B.weight' holds numbers that are not finite"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(), (2,), (1, 2, 12)])
def test_factors_that_are_no_matrices_are_refused(shape):
    with pytest.raises(UserError, match=r"'proj_out' has a lora_down.weight of shape"):
        by_layer(TENSORS | {"transformer.proj_out.lora_A.weight": torch.ones(shape)}, LINEARS, "file")
