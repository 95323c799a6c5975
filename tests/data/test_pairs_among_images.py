"""Pairs and images in one run: who stands where, what is asked about each, and that nothing depends on who does what."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from dedistill.data.digits import load_digits
from dedistill.data.encode import open_data
from dedistill.data.mixture import Mixture, Part, beside_pairs
from dedistill.data.pairs import PairSource
from dedistill.data.source import QuarantineSource
from dedistill.distributed.world import World, ceil_div
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.objectives.base import objective_for
from dedistill.recipe import Recipe, load_recipe
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.runs.model import open_base
from dedistill.sampling.pairs import make_pairs
from dedistill.sampling.sampler import Sampling
from dedistill.train import main

COUNT = 48
MIXED = ["train.objective=reflow", "data.pairs_share=0.7"]


def made(recipe: Recipe, folder: Path, count: int = COUNT) -> Path:
    """A folder of pairs of the model that ``recipe`` starts from."""
    model = open_base(recipe)
    how = Sampling(steps=2)
    make_pairs(model, load_digits(0.0), folder, teacher="t", count=count, sampling=how, points=1, seed=3, shard_size=count)
    return folder


@pytest.fixture
def recipe(adapter_recipe, tmp_path) -> Recipe:
    folder = made(load_recipe(adapter_recipe), tmp_path / "pairs")
    return load_recipe(adapter_recipe, [*MIXED, f"data.pairs={folder}", "validate.samples=40", "train.batch=16"])


@pytest.fixture
def mixture(recipe) -> Mixture:
    return beside_pairs(recipe, load_digits(0.2), (1, 8, 16))


def drawn(source, seed: int, step: int, positions: np.ndarray, batch: int, **kind) -> dict[int, tuple]:
    """Part, name, noise and image at each position, however they come in groups."""
    found = {}
    slots = source.slots(seed, step, batch, **kind)
    for part in ("pairs", "images"):
        if group := [p for p in positions.tolist() if slots[p].part == part]:
            got, names = source.draw([slots[p] for p in group]), [slots[p].name for p in group]
            noise = [None] * len(group) if got.noise is None else [n.numpy().tobytes() for n in got.noise]
            found |= zip(group, zip([part] * len(group), names, noise, [x.numpy().tobytes() for x in got.latents]))
    assert sorted(found) == sorted(positions.tolist())
    return found


@pytest.mark.parametrize("share", [0.7, 0.05, 0.5])
def test_shares_are_kept_and_each_part_walks_its_own_epochs(recipe, share):
    """To one sample in whole blocks; the k-th pair is the one that stands k-th where there is nothing but pairs."""
    pairs, digits = PairSource(Path(recipe.data.pairs)), load_digits(0.2)
    source = Mixture(5, [Part("pairs", pairs, share), Part("images", digits, 1 - share)])
    batch, steps, order = 16, 20, {"pairs": [], "images": []}
    for step in range(steps):
        found = drawn(source, 5, step, np.arange(batch), batch)
        for position in range(batch):
            part, name, *_ = found[position]
            order[part].append(name)
        total = (step + 1) * batch
        assert abs(len(order["pairs"]) - share * total) <= 1 or total % keyed.BLOCK
    for part, alone in (("pairs", pairs), ("images", digits)):
        steps = ceil_div(len(order[part]), batch)
        own = [slot.name for step in range(steps) for slot in alone.slots(5, step, batch)]
        assert order[part] == own[: len(order[part])]
    first = order["pairs"][: len(pairs.train_ids)]
    assert len(set(first)) == len(first)


def test_what_stands_at_a_place_does_not_depend_on_how_a_step_is_cut(mixture):
    whole = drawn(mixture, 5, 3, np.arange(32), 32)
    assert {part for part, *_ in whole.values()} == {"pairs", "images"}
    for cut in (np.arange(31, -1, -1), np.array([7]), np.array([30, 2, 9])):
        assert all(found == whole[p] for p, found in drawn(mixture, 5, 3, cut, 32).items())


def test_held_out_samples_are_those_that_each_part_holds_out(mixture):
    pairs = mixture.parts[0].source
    found = drawn(mixture, 5, 0, np.arange(40), 40, held_out=True).values()
    held = {f"pairs/{i}" for i in pairs.held_out_ids}
    assert {name for part, name, *_ in found if part == "pairs"} == held
    assert all(name.startswith("digits/held-out/") for part, name, *_ in found if part == "images")
    trained = {name for step in range(20) for _, name, *_ in drawn(mixture, 5, step, np.arange(8), 8).values()}
    assert not trained & held


def test_a_substitute_is_of_the_same_part(mixture):
    before = drawn(mixture, 5, 2, np.arange(24), 24)
    out = {before[p][1]: 0 for p in (0, 1, 2, 3)}
    after = drawn(QuarantineSource(mixture, out), 5, 2, np.arange(24), 24)
    assert not {name for _, name, *_ in after.values()} & out.keys()
    assert [after[p][0] for p in range(24)] == [before[p][0] for p in range(24)]


def test_a_pair_keeps_its_noise_and_its_caption_and_an_image_gets_any(recipe, mixture):
    """Also where half of the captions are dropped: those of images alone."""
    data = recipe.data.model_copy(update={"caption_dropout": 0.5})
    objective = objective_for(recipe.model_copy(update={"data": data}), mixture, lambda shape: 1.0)
    empty = {"pairs": 0, "images": 0}
    for step in range(4):
        slots = mixture.slots(recipe.run.seed, step, 16)
        for group in objective.share(step, 16, World())[0]:
            batch, asked = mixture.draw([slots[p] for p in group]), objective.noisy_batch(step, group)
            fresh = keyed.noise(recipe.run.seed, "noise", step, group, (1, 8, 16))
            noise = fresh if asked.part == "images" else batch.noise
            s = asked.sigma.reshape(-1, 1, 1, 1)
            torch.testing.assert_close(asked.noisy, (1 - s) * batch.latents + s * noise)
            torch.testing.assert_close(asked.target, noise - batch.latents)
            empty[asked.part] += asked.captions.count("")
            assert {slots[p].part for p in group} == {asked.part}
    assert empty["pairs"] == 0 < empty["images"]


def saved(out: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(out / "checkpoints")[-1] / "trainable.safetensors")


@pytest.mark.long
def test_a_run_tells_the_loss_of_each_and_ends_the_same_however_it_is_cut(recipe, adapter_recipe, tmp_path):
    """Stopped and continued, on one process or two."""
    settings = [
        *MIXED,
        f"data.pairs={recipe.data.pairs}",
        "train.exact=true",
        "train.batch=8",
        "snapshot.every=0",
        "validate.samples=40",
    ]

    def words(out: str, *more: str) -> list[str]:
        every = (f"run.out={tmp_path / out}", *settings, *more)
        return [str(adapter_recipe), *(word for setting in every for word in ("--set", setting))]

    assert main(words("whole")) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    source = beside_pairs(recipe, load_digits(recipe.data.caption_noise), (1, 8, 16))
    for step, row in enumerate(rows):
        parts = [part for part, *_ in drawn(source, recipe.run.seed, step, np.arange(8), 8).values()]
        share = parts.count("pairs") / 8
        assert row["loss"] == pytest.approx(share * row["loss_pairs"] + (1 - share) * row.get("loss_images", 0))
    last = rows[-1]
    assert last["val_images"] == last["val_images_pairs"] + last["val_images_images"]
    assert (
        min(last["val_loss_pairs"], last["val_loss_images"])
        < last["val_loss"]
        < max(last["val_loss_pairs"], last["val_loss_images"])
    )
    assert run_ranks(2, main, words("two"), said=tmp_path / "said") == [0, 0], (tmp_path / "said" / "0").read_text()[-800:]
    whole, journal = saved(tmp_path / "whole"), (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert all(torch.equal(whole[name], tensor) for name, tensor in saved(tmp_path / "two").items())
    assert (tmp_path / "two" / "metrics.jsonl").read_bytes() == journal
    shutil.rmtree(list_checkpoints(tmp_path / "whole" / "checkpoints")[-1])
    assert main(words("whole")) == 0
    assert all(torch.equal(whole[name], tensor) for name, tensor in saved(tmp_path / "whole").items())
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == journal


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.pairs_share=0.5"], "data.pairs_share: has no effect without data.pairs"),
        (["data.pairs=p", "train.objective=reflow"], "data.pairs_share: required with data.pairs"),
        (["data.pairs=p", "data.pairs_share=0.5"], "data.pairs: needs objective = 'reflow' or 'rectified_diffusion'; 'flow'"),
        (["data.pairs=p", "data.pairs_share=0.5", "train.objective=endpoint"], "'endpoint' does not train on both"),
        (["data.pairs=p", "data.pairs_share=1.5", "train.objective=reflow"], "data.pairs_share"),
        (["data.source=pairs", "data.path=p", "data.pairs=q", "data.pairs_share=0.5", "train.objective=reflow"], "data.path"),
        (["train.objective=reflow"], "data.pairs and online are for pairs beside images"),
    ],
)
def test_what_makes_no_sense_is_refused(teacher_recipe, settings, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        load_recipe(teacher_recipe, settings)


def test_pairs_of_another_shape_and_damaged_ones_are_refused_by_their_own_key(recipe, tmp_path, adapter_recipe, capsys):
    with pytest.raises(UserError, match=r"data.pairs: pairs are 1 x 8 x 16 .* the network takes 1 x 16 x 16"):
        beside_pairs(recipe, load_digits(0.2), (1, 16, 16))
    settings = [word for s in [*MIXED, f"data.pairs={tmp_path / 'pairs'}"] for word in ("--set", s)]
    (tmp_path / "pairs" / "00000.tar").write_bytes(b"")
    assert main([str(adapter_recipe), *settings]) == 1
    assert "data.pairs: shard" in capsys.readouterr().err.replace("\n", "")
    settings[-1] = f"data.pairs={tmp_path / 'nowhere'}"
    assert main([str(adapter_recipe), *settings]) == 2
    assert "data.pairs: " in (said := capsys.readouterr().err) and "no such folder" in said


@pytest.mark.long
def test_latents_of_one_s_own_images_among_pairs(image_recipe, tmp_path):
    """Whose captions are encoded beforehand, while those of pairs are when they come; images are of several shapes."""
    plain = load_recipe(image_recipe)
    made(plain, tmp_path / "pairs", 8)
    settings = [*MIXED, f"data.pairs={tmp_path / 'pairs'}", "data.resolutions=[32, 64]", "train.batch=8"]
    assert main([str(image_recipe), *(word for s in settings for word in ("--set", s))]) == 0
    recipe = load_recipe(image_recipe, settings)
    rows = [json.loads(line) for line in (Path(recipe.run.out) / "metrics.jsonl").read_text().splitlines()]
    assert all(row["applied"] and {"loss_pairs", "loss_images"} <= row.keys() for row in rows)
    source = beside_pairs(recipe, open_data(recipe, "cpu", print).source, (16, 8, 8))
    assert max(slot.cost for slot in source.slots(0, 0, 8)) == 64 * 64, "a pair is as much work as an image of its size"
