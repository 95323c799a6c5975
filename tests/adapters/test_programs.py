"""Each row of the table against its program: the program itself where it is installed, else its rule, written as facts.

The facts, from the sources: names as patterns, the shapes that ai-toolkit makes, and what each does with alpha.
"""

import itertools
import json
import re
from functools import cache
from math import ceil
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders import lora_pipeline
from lycoris import create_lycoris_from_weights
from safetensors.torch import save_file
from test_formats import adapted, answer, flux, relative, rewidened
from test_naming import SHAPES, normal

import dedistill
from dedistill.adapters.compatibility import MERGED, Verdict, check_adapter
from dedistill.adapters.delta import weight_change
from dedistill.adapters.formats import as_kohya, as_lycoris, as_peft, as_transformer, by_layer
from dedistill.adapters.targets import adaptable
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.flux.published import full_config
from dedistill.release.folder import skeleton

LORA_WEIGHTS, LORA_ADAPTER = "diffusers, load_lora_weights", "diffusers, transformer.load_lora_adapter"
LOAD_LOKR, TOOLKIT, OLD_TOOLKIT = "diffusers, dedistill.load_lokr", "ai-toolkit", "ai-toolkit, old_lokr_format: true"
OTHER_NAMES = {  # of the whole network, LoRA
    "onetrainer": lambda layers: renamed(as_lycoris(layers), "lycoris_", "lora_transformer_"),
    "comfy": lambda layers: original(layers, "diffusion_model."),
    "original": lambda layers: original(layers, ""),
    "wrapped": lambda layers: renamed(as_peft(layers), "transformer.", "base_model.model."),
}
WRITE = {"lycoris": as_lycoris, "transformer": as_transformer}
WRITE_LORA = WRITE | {"peft": as_peft, "kohya": lambda layers: as_kohya(layers, naming, SHAPES)} | OTHER_NAMES


made = cache(adapted)


def of_rank_2() -> dict:
    return {n: f for n, f in made("lora").layers.items() if len(f["lora_down.weight"]) == 2}


def renamed(tensors: dict, old: str, new: str) -> dict:
    return {new + key.removeprefix(old): tensor for key, tensor in tensors.items()}


def original(layers: dict, prefix: str) -> dict:
    """kohya's file with the dotted names of the original network."""
    dotted = {naming.kohya_name(name): name for name in dict(map(naming.original_parts, SHAPES))}
    file = as_kohya(layers, naming, SHAPES)
    return {f"{prefix}{dotted[key.partition('.')[0]]}.{key.partition('.')[2]}": tensor for key, tensor in file.items()}


def verdicts(tensors: dict, header: dict | None = None) -> dict[str, Verdict]:
    return {v.program: v for v in check_adapter(tensors, SHAPES, naming, header=header)}


FLAT = r"(double|single)_blocks_\d+_\w+"
DOTTED = r"(double|single)_blocks\.\d+\.[\w.]+"
INS = r"img_in|txt_in|(time|vector|guidance)_in[_.](in|out)_layer"
FINAL = r"final_layer[_.](linear|adaLN_modulation[_.]1)"
OUTSIDE = r"(x|context)_embedder|proj_out|norm_out[_.]linear|time_text_embed[_.]\w+embedder[_.]linear_\d"
OWN = rf"{OUTSIDE}|(single_)?transformer_blocks[_.].+"
LORA = r"lora_(up|down)\.weight"
LOKR = r"lokr_w[12](_[ab])?"
FACTS = {
    "ComfyUI": [
        rf"(lycoris_|transformer\.|lora_transformer_)({OWN})\.({LORA}|lora_[AB]\.weight|{LOKR}|alpha)",
        rf"lora_unet_({FLAT}|{INS}|{FINAL})\.({LORA}|{LOKR}|alpha)",
        rf"diffusion_model\.({DOTTED}|{INS}|{FINAL})\.({LORA}|lora_[AB]\.weight|{LOKR}|alpha)",
    ],
    "LyCORIS": [rf"lycoris_({OWN})\.({LORA}|{LOKR}|alpha)"],
    "SimpleTuner": [rf"lycoris_({OWN})\.({LORA}|{LOKR}|alpha)", rf"transformer\.({OWN})\.(lora_[AB]\.weight|alpha)"],
    "kohya sd-scripts": [rf"lora_unet_({FLAT}|{INS})\.({LORA}|alpha)"],
    TOOLKIT: [rf"transformer\.({OWN})\.({LORA}|lora_[AB]\.weight)"],
}


@pytest.mark.parametrize("program", FACTS)
@pytest.mark.parametrize("spelling", WRITE_LORA)
def test_names_that_programs_look_for(spelling, program):
    tensors = WRITE_LORA[spelling](made("lora").layers)
    expected = [key for key in tensors if any(re.fullmatch(pattern, key) for pattern in FACTS[program])]
    found = verdicts(tensors)[program]
    assert found.loaded == expected and found.ignored == [key for key in tensors if key not in expected]
    assert found.whole == (len(expected) == len(tensors)) == (not found.use)


@pytest.mark.parametrize("spelling", WRITE_LORA)
def test_load_lora_weights_is_what_diffusers_does(spelling, tmp_path, monkeypatch):
    """Its converter and its filter; the layers it ends with are those of which the table says that it loads them."""
    tensors = WRITE_LORA[spelling](made("lora").layers)
    save_file(tensors, tmp_path / "a.safetensors")
    convert = rewidened(lora_pipeline._convert_kohya_flux_lora_to_diffusers)
    monkeypatch.setattr(lora_pipeline, "_convert_kohya_flux_lora_to_diffusers", convert)
    found, kept = verdicts(tensors)[LORA_WEIGHTS], set()
    if not found.why:
        state = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="a.safetensors")
        kept = {k.split(".lora_")[0][12:] for k in state if k.startswith("transformer.") and "lora" in k} & SHAPES.keys()
    elif spelling != "wrapped":  # of which it would need every layer of fal's network
        assert spelling in ("lycoris", "original", "comfy")
    layers = (
        by_layer({k: tensors[k] for k in found.loaded if not k.endswith(".alpha")}, SHAPES, "x", naming=naming) if kept else {}
    )
    assert layers.keys() == kept


def test_load_lora_weights_takes_xlabs_processors(tmp_path):
    names = [f"double_blocks.0.processor.{p}_lora{n}" for p in ("qkv", "proj") for n in (1, 2)]
    rows = {"qkv": 96, "proj": 32}
    tensors = {f"{n}.up.weight": normal(rows[re.search("qkv|proj", n)[0]], 2) for n in names}
    tensors |= {f"{n}.down.weight": normal(2, 32) for n in names}
    save_file(tensors, tmp_path / "a.safetensors")
    kept = {k.split(".lora_")[0][12:] for k in FluxPipeline.lora_state_dict(str(tmp_path), weight_name="a.safetensors")}
    found = verdicts(tensors)
    assert found[LORA_WEIGHTS].whole and kept == by_layer(tensors, SHAPES, "x", naming=naming).keys()
    assert not found["ComfyUI"].loaded, "it knows them by the last block of each kind, in a network of 19 and 38"


@pytest.mark.parametrize("missing", [None, "single_blocks.37.processor.qkv_lora", "double_blocks.18.processor.qkv_lora2"])
def test_comfyui_knows_xlabs_processors_by_the_last_blocks(missing):
    """Of 19 and 38; in a file without one of them it looks for none."""
    shapes = adaptable(skeleton(full_config("", False)))
    names = [f"double_blocks.{i}.processor.{p}_lora{n}" for i in range(19) for p in ("qkv", "proj") for n in (1, 2)]
    names += [f"single_blocks.{i}.processor.{p}_lora" for i in range(38) for p in ("qkv", "proj")]
    sides = {"qkv": (9216, 3072), "proj_lora": (3072, 15360), "proj": (3072, 3072)}
    tensors = {}
    for name in names:
        kind = "qkv" if "qkv" in name else "proj_lora" if name.endswith("proj_lora") else "proj"
        tensors |= {f"{name}.up.weight": torch.ones(sides[kind][0], 1), f"{name}.down.weight": torch.ones(1, sides[kind][1])}
    tensors = {key: tensor for key, tensor in tensors.items() if missing is None or not key.startswith(f"{missing}.")}
    found = {v.program: v for v in check_adapter(tensors, shapes, naming)}
    assert found["ComfyUI"].whole == (missing is None) and found["ComfyUI"].use == ("--format lycoris" if missing else "")
    assert found[LORA_WEIGHTS].whole


@pytest.mark.parametrize("form", ["lokr", "lokr-rank", "lokr-mixed", "lora"])
@pytest.mark.parametrize("spelling", WRITE)
def test_lycoris_is_as_the_table_says(form, spelling):
    tensors = WRITE[spelling](made(form).layers)
    loaded = verdicts(tensors)["LyCORIS"].loaded
    net = flux(guidance=True)
    modules = create_lycoris_from_weights(1.0, "", net, weights_sd=dict(tensors))[0].loras
    assert {f"{m.lora_name}" for m in modules} == {key.partition(".")[0] for key in loaded}


def random_lokr(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """A LoKr on some linears, of one factor or two, of one rank, several, or none, decomposed once, twice or not."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *of: of[int(torch.randint(len(of), (), generator=g))]  # noqa: E731
    patterns = [draw("attn", "ff", "proj_out", "linear", "."), draw("proj_out", "to_q", "norm")]
    factors, ranks, both = [draw(2, 4, 8), draw(4, 4, 2)], [draw(1, 2, 3), draw(1, 2, 40)], draw(False, False, True)
    layers = {}
    for i, (name, (rows, columns)) in enumerate(SHAPES.items()):
        if not any(p in name for p in patterns):
            continue
        last = patterns[1] in name
        factor, rank = factors[last and seed % 3 == 0], ranks[last and seed % 2 == 0]
        (a, c), (b, d) = sized(rows, factor), sized(columns, factor)
        first = {"lokr_w1": normal(a, b, seed=i)}
        if both and rank < max(a, b) / 2:
            first = {"lokr_w1_a": normal(a, rank, seed=i), "lokr_w1_b": normal(rank, b, seed=i)}
        second = {"lokr_w2": normal(c, d, seed=i)}
        if rank < max(c, d) / 2:
            second = {"lokr_w2_a": normal(c, rank, seed=i), "lokr_w2_b": normal(rank, d, seed=i)}
        layers[name] = {n: 0.1 * t for n, t in (first | second).items()}
    return layers


def sized(side: int, factor: int) -> tuple[int, int]:
    """A side of a weight as ai-toolkit and PEFT part it: the setting itself where it divides, else the largest divisor below it
    that brings the two parts nearer; -1: the two nearest divisors."""
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    pairs = [(d, side // d) for d in range(1, side + 1) if side % d == 0 and d <= side // d]
    return max(pair for pair in pairs if factor < 0 or pair[0] <= max(factor, 1))


@pytest.mark.parametrize("seed", range(12))
def test_load_lora_adapter_is_what_diffusers_does(seed):
    """It gives the layers the change of weight that the file stands for if and only if the table says so."""
    layers = random_lokr(seed)
    found = verdicts(as_transformer(layers))[LORA_ADAPTER]
    net, right = flux(guidance=True), False
    try:
        net.load_lora_adapter(as_transformer(layers), prefix="transformer")
        deltas = {name: net.get_submodule(name).get_delta_weight("default_0") for name in layers}
        right = all(relative(deltas[name], weight_change(f)) < 1e-5 for name, f in layers.items())
    except (ValueError, RuntimeError):  # no single factor, sizes that do not fit
        pass
    assert found.whole == right, found.why
    assert bool(found.why) == (not right) and (right or "dedistill.load_lokr" in found.why)


def test_a_rank_that_goes_to_another_layer_is_noticed():
    """PEFT takes the rank of 'proj_out' for that of every layer whose name ends so."""
    layers = {n: f for n, f in made("lokr").layers.items() if n.endswith("proj_out") or "norm" in n}
    small = {f"lokr_w2_{x}": normal(*((1, 2) if x == "a" else (2, 8))) for x in "ab"}
    layers["proj_out"] = {"lokr_w1": layers["proj_out"]["lokr_w1"], **small}
    found = verdicts(as_transformer(layers))[LORA_ADAPTER]
    assert not found.loaded and "3 layers, e.g. 'single_transformer_blocks.0.proj_out', with random factors" in found.why
    assert found.use == MERGED and verdicts(as_transformer(layers))[LOAD_LOKR].whole


def toolkit_can(layers: dict) -> bool:
    """Whether one factor and one rank give these shapes: the first factor whole, the second in two where the rank is less than
    half of its longer side."""
    sides = {s for shape in SHAPES.values() for s in shape}
    for factor, rank in itertools.product([-1, *range(1, max(sides))], [1, 2, 3, 40, 10**9]):
        made = {}
        for name in layers:
            (a, c), (b, d) = (sized(side, factor) for side in SHAPES[name])
            second = {"lokr_w2": (c, d)} if rank >= ceil(max(c, d) / 2) else {"lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d)}
            made[name] = {"lokr_w1": (a, b), **second}
        if made == {name: {w: tuple(t.shape) for w, t in f.items()} for name, f in layers.items()}:
            return True
    return False


@pytest.mark.parametrize("seed", range(12))
def test_ai_toolkit_has_one_factor_and_one_rank(seed):
    layers = random_lokr(seed)
    can = toolkit_can(layers)
    new, old = verdicts(as_transformer(layers)), verdicts(as_lycoris(layers))
    assert new[TOOLKIT].whole == old[OLD_TOOLKIT].whole == can, new[TOOLKIT].why
    assert not new[OLD_TOOLKIT].loaded and not old[TOOLKIT].loaded, "each format needs its own setting"
    if can:
        assert old[TOOLKIT].use == "--format transformer" and new[OLD_TOOLKIT].use == "--format lycoris"
        outside = any("transformer_blocks" not in name for name in layers)
        assert "network.lokr_factor: " in new[TOOLKIT].note and ("transformer_only: false" in new[TOOLKIT].note) == outside
        ranks = {str(f["lokr_w2_b"].shape[0]) for f in layers.values() if "lokr_w2_b" in f}
        assert set(re.findall(r"lokr_full_rank: false, linear: (\d+)", new[TOOLKIT].note)) == ranks


@pytest.mark.parametrize("form", ["lokr", "lokr-rank", "lokr-mixed"])
@pytest.mark.parametrize("spelling", WRITE)
def test_load_lokr_is_as_the_table_says(form, spelling, tmp_path):
    own = made(form)
    tensors = WRITE[spelling](own.layers)
    save_file(tensors, tmp_path / "a.safetensors")
    net = flux(guidance=True)
    dedistill.load_lokr(SimpleNamespace(transformer=net), tmp_path / "a.safetensors")
    assert verdicts(tensors)[LOAD_LOKR].whole and relative(answer(net), own.answer) < 1e-6


# --- strength --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "alpha"), [(0.25, 8.0), (2.0, 1.0)])
def test_who_does_not_look_at_alpha(by, alpha):
    """A file of rank 2 that carries alpha as a tensor: ai-toolkit and diffusers (under 'transformer.') load it at another
    strength, and the table says at which."""
    layers = {
        n: {**f, "alpha": torch.tensor(alpha)} for n, f in adapted("lora").layers.items() if len(f["lora_down.weight"]) == 2
    }
    tensors = {f"transformer.{n}.{w}": t for n, f in layers.items() for w, t in f.items()}
    found = verdicts(tensors)
    for program in (TOOLKIT, LORA_WEIGHTS):
        assert f"{len(layers)} layers at {by:g} of the strength" in found[program].strength and not found[program].whole
    assert found["ComfyUI"].whole and found[TOOLKIT].use == "--format transformer"
    equal = verdicts({k: torch.tensor(2.0) if k.endswith("alpha") else t for k, t in tensors.items()})
    assert not any(v.strength for v in equal.values())
    net = flux(guidance=True)
    state, alphas = FluxPipeline.lora_state_dict(dict(tensors), return_alphas=True)
    state = {k: t for k, t in state.items() if "lora" in k}
    FluxPipeline.load_lora_into_transformer(state, network_alphas=alphas, transformer=net)
    for name, factors in layers.items():
        assert relative(net.get_submodule(name).get_delta_weight("default_0") / by, weight_change(factors)) < 1e-5


def test_who_does_not_read_the_header():
    tensors = as_peft(of_rank_2())
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 16})}
    found = verdicts(tensors, header)
    assert "at 0.125 of the strength" in found["ComfyUI"].strength and found["ComfyUI"].use == "--format lycoris"
    assert "at 0.125 of the strength" in found[TOOLKIT].strength
    assert "at 0.125 of the strength" in found["SimpleTuner"].strength, "its init_lora takes alphas from tensors"
    assert found[LORA_WEIGHTS].whole and found[LORA_ADAPTER].whole


# --- what is used instead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lora", "lokr", "lokr-mixed"])
def test_the_advised_format_loads_whole_and_whole_files_come_first(form):
    layers = made(form).layers
    formats = {f: WRITE_LORA[f] for f in ("lycoris", "transformer", "peft", "kohya") if form == "lora" or f in WRITE}
    for write in formats.values():
        found = check_adapter(write(layers), SHAPES, naming)
        order = [(not v.whole, -len(v.loaded)) for v in found]
        assert order == sorted(order) and found[0].program == "ComfyUI"
        for verdict in found:
            if verdict.whole:
                assert not verdict.use
            elif verdict.use == MERGED:
                assert not any(verdicts(other(layers))[verdict.program].whole for other in formats.values())
            else:
                advised = formats[verdict.use.removeprefix("--format ")](layers)
                assert verdicts(advised)[verdict.program].whole


def test_files_that_are_not_read_here_have_a_table_too():
    """A DoRA: ComfyUI and LyCORIS take it, and no format is advised."""
    tensors = as_lycoris(adapted("lora", ["x_embedder"]).layers) | {"lycoris_x_embedder.dora_scale": torch.ones(1, 4)}
    found = verdicts(tensors)
    assert found["ComfyUI"].whole and found["LyCORIS"].whole and "is a DoRA" in found[LOAD_LOKR].why
    assert not any(v.use for v in found.values())
