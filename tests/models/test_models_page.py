"""docs/models.md: the table of families, each cell of which is what the family does here."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from test_conformance import CAPTIONS, LENGTH, UNMASKED
from tiny_recipes import IMAGES

from dedistill.adapters.compatibility import check_adapter
from dedistill.adapters.formats import ADAPTER_FORMATS, as_kohya, by_layer
from dedistill.adapters.targets import adaptable
from dedistill.flow.solvers import SOLVERS
from dedistill.models import compiled as compiling
from dedistill.models.model import Model, assemble
from dedistill.models.quantize import float_dtype
from dedistill.models.registry import get_family
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import recipe_of
from dedistill.release.export import formats_of
from dedistill.release.folder import names_of
from dedistill.sampling.sampler import Sampling, sample, start_noise

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
HEAD, _, *LINES = [line for line in PAGE.splitlines() if line.startswith("|")]
COLUMNS = [cell.strip() for cell in HEAD.strip("|").split("|")]
ROWS = {}
for line in LINES:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) != len(COLUMNS):
        break
    ROWS[cells[0].strip("`")] = dict(zip(COLUMNS, cells))
every_row = pytest.mark.parametrize("name", ROWS)


def list_of(cell: str) -> list[str]:
    return [part.strip() for part in cell.split(",")]


@pytest.fixture
def built(tiny_model):
    """Makes a tiny model of a family, ready to be trained."""
    return lambda name, kind="lora", **tables: assembled(tiny_model(name), name, kind, **tables)


def assembled(components, name: str, kind: str | None, **tables) -> Model:
    text = IMAGES.format(out="a", base="a", images="a", cache="a")
    recipe = tomllib.loads(text)
    recipe["model"] |= {"family": name, "text_length": LENGTH}
    recipe["adapter"] = {
        "kind": kind,
        "targets": [{"preset": "attention"} | ({"rank": 2} if kind == "lora" else {"factor": 4})],
    }
    if kind is None:
        del recipe["adapter"]
    for table, keys in tables.items():
        recipe[table] = recipe.get(table, {}) | keys
    made: Recipe = recipe_of(recipe)
    return assemble(made, get_family(name), components, "cpu")


def step(model: Model) -> None:
    """Forward and backward."""
    model.components.text_length = LENGTH
    noisy = start_noise(0, 3, (model.components.sample_shape[0], 8, 8))
    model.velocity(noisy, torch.tensor([0.2, 0.5, 0.9]), model.encode(CAPTIONS, LENGTH)).square().mean().backward()


def test_flux_and_sd3_have_rows():
    assert {"flux", "sd3"} <= ROWS.keys()


@every_row
def test_what_is_trained(name, built):
    kinds = {"LoRA": "lora", "LoKr": "lokr", "whole": None}
    assert list_of(ROWS[name]["trained"]) == list(kinds)
    for kind in kinds.values():
        model = built(name, kind)
        step(model)
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.trainable().values()), kind


@every_row
def test_the_base(name, built):
    bases = {
        "int8": {"quant": "int8"},
        "int8 products": {"quant": "int8", "matmul": "int8"},
        "fp8 products": {"quant": "fp8", "matmul": "fp8"},
        "swap": {"swap": 3},
    }
    assert list_of(ROWS[name]["base"]) == [*bases, "compile"]
    for base in bases.values():
        model = built(name, base=base, train={"gradient_checkpointing": True})
        step(model)
        assert model.facts["quantized"] if "quant" in base else model.facts["swap"]
        assert all(p.grad is not None for p in model.trainable().values())


ELSEWHERE = {"flux": "test_compiled.py", "sdxl": "blocks of the kind of sd15"}


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ELSEWHERE else n for n in ROWS])
@pytest.mark.parametrize("block", [0, pytest.param(-1, marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same_bits(name, block, built, monkeypatch):
    """As graphs that are taken down whole; to make C++ of one takes a minute. All of a
    network, computed again: test_compiled.py."""
    monkeypatch.setattr(compiling, "COMPILER", "eager")
    torch._dynamo.reset()
    answers = []
    for compiled in (False, True):
        model = built(name)
        if compiled:
            made = model.family.blocks(model.components.denoiser)
            assert compiling.compile_blocks(model.family, [made[block]]) == 1
        step(model)
        answers.append([p.grad for p in model.trainable().values()])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    torch._dynamo.reset()


@every_row
def test_padding_and_guidance(name, tmp_path):
    assert ROWS[name]["padding of captions"] == ("shown" if name in UNMASKED else "hidden or shown")
    spec = get_family(name).spec
    embedding = any(spec.distilled_guidance(base.sizes) for base in spec.published)
    assert ROWS[name]["guidance"] == "CFG" + (", distilled embedding" if embedding else "")


@every_row
def test_solvers(name, built):
    assert list_of(ROWS[name]["solvers"]) == list(SOLVERS)
    model = built(name)
    model.components.text_length = LENGTH
    noise = start_noise(0, 1, (model.components.sample_shape[0], 8, 8))
    images = [sample(model, CAPTIONS[:1], noise, Sampling(solver=solver, steps=3)) for solver in SOLVERS]
    assert all(image.isfinite().all() for image in images)
    assert len({image.numpy().tobytes() for image in images}) == len(SOLVERS)


@every_row
def test_exports_and_adapters(name, built):
    family = get_family(name)
    assert tuple(list_of(ROWS[name]["exports of models"])) == formats_of(family.spec)
    model, naming = built(name), names_of(family.spec)
    model.adapter.detach_from_base()
    denoiser = model.components.denoiser
    shapes = adaptable(denoiser)
    assert float_dtype(denoiser) == torch.float32
    layers = by_layer(model.tensors(), shapes, "x", folder=family.spec.folder, naming=naming)
    whole = set()
    for tensors in (
        as_kohya(layers, naming, shapes),
        *(write(layers, family.spec.folder) for write in ADAPTER_FORMATS.values()),
    ):
        verdicts = check_adapter(tensors, shapes, naming, family.spec.folder)
        whole |= {re.split(r"[, ]", verdict.program)[0] for verdict in verdicts if verdict.whole}
    assert set(list_of(ROWS[name]["adapters load whole in"])) <= whole


@every_row
def test_licences_and_parents(name):
    published = get_family(name).spec.published
    licences = dict.fromkeys((p.licence.name or p.licence.id, p.licence.binding) for p in published)
    told = [f"{licence}{', binding' if binding else ''}" for licence, binding in licences]
    assert ROWS[name]["licence, binding"] == "; ".join(told)
    parents = [f"{p.parent.partition('/')[2]} of {p.id.partition('/')[2]}" for p in published if p.parent]
    assert ROWS[name]["undistilled parent"] == "; ".join(parents)
