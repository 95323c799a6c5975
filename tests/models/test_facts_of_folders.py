"""What model folders say of themselves, and configs: taken, or refused by file and key."""

import pytest
from diffusers import AutoencoderKL, FluxTransformer2DModel

from dedistill.errors import UserError
from dedistill.models.pretrained import without_weights
from dedistill.models.registry import checked_facts

STEP = {"step": 3, "recipe": "[run]\nname = 'x'"}
MERGE = STEP | {"adapter": "a", "adapter_header": {}, "dtype": "bf16", "rounding": "nearest"}


def test_facts_as_we_write_them_are_taken():
    facts = {
        "base": {"path": None, "revision": None},
        "trained": [STEP],
        "merges": [MERGE, MERGE | {"kept": 0.9}],
    }
    assert checked_facts(facts, "here") is facts and checked_facts({}, "here") == {}


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        ({"trained": "x"}, "trained"),
        ({"trained": [{"step": 3}]}, "trained"),
        ({"merges": [5]}, "merges"),
        ({"trained": [{"recipe": "", "step": "3"}]}, "trained"),
        ({"merges": [MERGE | {"adapter_header": "x"}]}, "merges"),
        ({"merges": [MERGE | {"adapter_header": {"dedistill.recipe": 5}}]}, "merges"),
        ({"merges": [{key: value for key, value in MERGE.items() if key != "rounding"}]}, "merges"),
        ({"merges": [MERGE | {"dtype": "/home/me"}]}, "merges"),
        ({"merges": [MERGE | {"kept": "most"}]}, "merges"),
        ({"absent": 3}, "absent"),
        ({"merges": {"recipe": ""}}, "merges"),
        ({"base": []}, "base"),
        ({"base": {"path": 5}}, "base"),
        ({"components": ["x"]}, "components"),
        ({"family": {}}, "family"),
    ],
)
def test_facts_of_another_kind_are_refused_by_key(facts, key):
    with pytest.raises(UserError, match=f"here/dedistill.json: '{key}' is not what"):
        checked_facts(facts, "here/dedistill.json")


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        (FluxTransformer2DModel, {"num_layers": 2_000_000}, "num_layers = 2,000,000; at most 1,000"),
        (FluxTransformer2DModel, {"num_single_layers": 10**18}, "num_single_layers"),
        (AutoencoderKL, {"layers_per_block": 40_000}, "layers_per_block = 40,000"),
        (AutoencoderKL, {"block_out_channels": "wide"}, "does not describe a AutoencoderKL"),
        (FluxTransformer2DModel, {"attention_head_dim": None}, "does not describe a FluxTransformer2DModel"),
    ],
)
def test_configs_that_describe_no_network_are_refused(kind, config, said):
    with pytest.raises(UserError, match=f"^here: config.json .*{said}"):
        without_weights(kind, config, "here")
