"""Pairs that a model makes of itself while it trains: the same as dedistill pairs makes, and the same however a run is cut."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from dedistill.cli.main import main
from dedistill.data.digits import load_digits
from dedistill.data.pairs import PairSource
from dedistill.distributed.world import World
from dedistill.errors import UserError
from dedistill.models.model import Model
from dedistill.recipe import Recipe, load_recipe
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.runs.model import open_base
from dedistill.sampling.pairs import make_pairs
from dedistill.sampling.sampler import Sampling
from dedistill.training.fsdp import Fsdp2
from dedistill.training.online import SHARDS, OnlinePairs

ONLINE = ["online.every=2", "online.pairs=16", "online.steps=2", "train.objective=reflow", "data.pairs_share=0.75"]


@pytest.fixture
def recipe(adapter_recipe) -> Recipe:
    return load_recipe(adapter_recipe, ONLINE)


@pytest.fixture
def model(recipe) -> Model:
    return open_base(recipe)


def online(recipe: Recipe, model: Model, folder: Path, *settings: str) -> OnlinePairs:
    changed = load_recipe(recipe.files[0], [*ONLINE, *settings])
    return OnlinePairs(changed, model, load_digits(0.0), folder, World())


def names(source: PairSource, step: int, batch: int, **kind) -> list[str]:
    return [slot.name for slot in source.slots(0, step, batch, **kind)]


def numbers(source: PairSource) -> list[bytes]:
    return [states.tobytes() + caption.encode() for states, caption in map(source.read, range(len(source)))]


def test_a_model_that_stays_as_it_is_makes_what_dedistill_pairs_makes(recipe, model, tmp_path):
    """All rounds together are the pairs of the same seed, and are drawn like them; what it leaves is a folder of pairs."""
    source, how = online(recipe, model, tmp_path / "online"), Sampling(steps=2)
    for step in (2, 4):
        assert source.due(step) and not source.due(step - 1)
        source.make(step)
    settings = {"teacher": "t", "count": 48, "sampling": how, "points": 1, "seed": recipe.run.seed, "shard_size": 2}
    make_pairs(model, load_digits(0.0), tmp_path / "offline", **settings)
    offline = PairSource(tmp_path / "offline")
    assert numbers(source) == numbers(offline) == numbers(PairSource(tmp_path / "online")) and len(source) == 48
    assert set(names(source, 0, 40, held_out=True)) == {"pairs/0"}
    drawn = [name for step in range(6) for name in names(source, step, 8)]
    assert set(drawn) == {f"pairs/{i}" for i in range(1, 48)}


def test_only_the_newest_rounds_are_drawn_and_the_first_is_held_out_from(recipe, model, tmp_path):
    source = online(recipe, model, tmp_path / "p", "online.keep=1")
    before = source.slots(0, 0, 40, held_out=True)
    latents = source.draw(before).latents
    source.make(4)
    assert {name for step in range(9) for name in names(source, step, 8)} == {f"pairs/{i}" for i in range(32, 48)}
    assert source.slots(0, 0, 40, held_out=True) == before and torch.equal(source.draw(before).latents, latents)


def test_going_back_makes_later_rounds_anew_and_misses_none_of_earlier_weights(recipe, model, tmp_path):
    source = online(recipe, model, tmp_path / "p")
    source.make(2)
    source.make(4)
    later = sorted((tmp_path / "p").glob("*.tar"))[2 * SHARDS :]
    source.rollback(3)
    assert len(source) == 32 and not any(file.exists() for file in later) and source.due(4)
    (tmp_path / "p" / "00009.tar").unlink()
    source.rollback(2)  # its weights are these
    assert len(source) == 32
    (tmp_path / "p" / "00009.tar").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"00009.tar' cannot be read .* made of itself at step 2, and left behind for step 3"):
        source.rollback(3)


def saved(out: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(out / "checkpoints")[-1] / "trainable.safetensors")


def pairs(out: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((out / "pairs").glob("*.tar"))]


@pytest.mark.long
def test_a_run_ends_the_same_however_it_is_cut(adapter_recipe, tmp_path):
    """On one process or two; killed in a round, and before there was any checkpoint."""
    settings = [*ONLINE, "online.keep=2", "train.exact=true", "snapshot.every=0", "checkpoint.every=3", "checkpoint.keep=9"]

    def words(out: str) -> list[str]:
        every = (f"run.out={tmp_path / out}", "run.name=same", *settings)
        return ["train", str(adapter_recipe), *(word for setting in every for word in ("--set", setting))]

    assert main(words("whole")) == 0
    whole, shards = saved(tmp_path / "whole"), pairs(tmp_path / "whole")
    journal = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    rows = [json.loads(line) for line in journal.splitlines()]
    assert len(rows) == 6 and all("loss_pairs" in row for row in rows) and len(shards) == 3 * SHARDS
    first, later = PairSource(tmp_path / "whole" / "pairs"), 2 * 16
    assert first.read(1)[0][1].tobytes() != first.read(later)[0][1].tobytes()
    assert run_ranks(2, main, words("two"), said=tmp_path / "said") == [0, 0], (tmp_path / "said" / "0").read_text()[-800:]

    def cut(name: str, checkpoint: int, gone: slice) -> None:
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        for folder in list_checkpoints(tmp_path / name / "checkpoints")[checkpoint:]:
            shutil.rmtree(folder)
        for file in sorted((tmp_path / name / "pairs").glob("*.tar"))[gone]:
            file.unlink()
        (tmp_path / name / "pairs" / "pairs.json").unlink()
        assert main(words(name)) == 0

    cut("in_a_round", 1, slice(2 * SHARDS + 3, None))  # at step 3 there are two rounds, and the third has begun
    cut("at_the_start", 0, slice(SHARDS - 2, None))
    for name in ("two", "in_a_round", "at_the_start"):
        assert all(torch.equal(whole[key], tensor) for key, tensor in saved(tmp_path / name).items()), name
        assert pairs(tmp_path / name) == shards and (tmp_path / name / "metrics.jsonl").read_bytes() == journal, name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["online.pairs=32"], "online: has no effect while online.every is 0"),
        (["online.every=2", "train.objective=reflow"], "data.pairs_share: required with online.every"),
        (
            ["online.every=2", "data.pairs_share=1.0"],
            "online.every: needs objective = 'reflow' or 'rectified_diffusion'; 'flow'",
        ),
        ([*ONLINE, "data.pairs=p"], "online.every"),
        ([*ONLINE, "online.pairs=20"], "online.pairs"),
    ],
)
def test_what_makes_no_sense_is_refused(teacher_recipe, settings, said):
    with pytest.raises(UserError, match=said):
        load_recipe(teacher_recipe, settings)


def test_an_engine_of_parts_cannot(recipe):
    with pytest.raises(UserError, match=r"online.every: with fsdp2 no process makes pairs"):
        Fsdp2(recipe, World()).check()
