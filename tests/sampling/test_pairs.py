"""Stored pairs: what is kept with them, whether they can be made again, and what is refused."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samplings import at

from dedistill.cli.train import _shift_notes
from dedistill.data.digits import DigitSource, load_digits
from dedistill.data.pairs import PairSource
from dedistill.errors import UserError
from dedistill.flow.solvers import sigma_grid
from dedistill.io.atomic import checksummed, read_checksummed
from dedistill.io.hashing import file_sha256
from dedistill.models.model import Model, build_model
from dedistill.recipe.resolve import recipe_of
from dedistill.sampling import pairs
from dedistill.sampling.pairs import teacher_hash
from dedistill.sampling.sampler import sample, trajectories


def make_pairs(*args, steps: int, cfg: float, **settings) -> dict:
    return pairs.make_pairs(*args, sampling=at(steps, cfg), **settings)


SETTINGS = {"teacher": "hash", "count": 40, "cfg": 2.5, "steps": 6, "points": 3, "seed": 4, "shard_size": 16}
SHARDS = ["00000.tar", "00001.tar", "00002.tar"]


def model(seed: int = 0, **tables) -> Model:
    sizes = {"layers": 1, "single_layers": 1, "heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6]}
    return build_model(
        recipe_of(
            {
                "run": {"name": "a", "out": "a", "seed": seed},
                "model": {"family": "pixel_flux", "mask": "none", "new": {"height": 8, "width": 16, "patch": 4, **sizes}},
                "data": {"source": "digits"},
                "train": {"steps": 1, "batch": 1, "lr": 1e-3},
                **tables,
            }
        )
    )


@pytest.fixture(scope="module")
def teacher() -> Model:
    return model()


@pytest.fixture(scope="module")
def digits() -> DigitSource:
    return load_digits(0.2)


@pytest.fixture(scope="module")
def made(teacher, digits, tmp_path_factory) -> SimpleNamespace:
    """A finished folder that no test changes."""
    folder = tmp_path_factory.mktemp("pairs")
    return SimpleNamespace(folder=folder, facts=make_pairs(teacher, digits, folder, **SETTINGS))


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A copy of the finished folder to be damaged."""
    for file in made.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.tar"))}


def everything(source: PairSource) -> list[tuple[np.ndarray, np.ndarray, str]]:
    return [source._read(i) for i in range(SETTINGS["count"])]


def test_the_facts_are_stored(made):
    """Scale, solver, steps, negative prompt and teacher, beside the hash of every shard."""
    facts = read_checksummed(made.folder / "pairs.json")
    assert facts == made.facts and facts["complete"] is True
    assert {k: facts[k] for k in ("teacher", "cfg", "steps", "seed", "count", "shard_size")} == {
        k: v for k, v in SETTINGS.items() if k != "points"
    }
    assert facts["solver"] == "euler" and facts["negative_prompt"] == "" and facts["picture"] == [1, 8, 16]
    assert facts["sigmas"] == pytest.approx([1, 2 / 3, 1 / 3, 0]) and facts["source"] == "digits"
    assert [(s["file"], s["pairs"]) for s in facts["shards"]] == list(zip(SHARDS, (16, 16, 8)))
    assert all(s["sha256"] == file_sha256(made.folder / s["file"]) for s in facts["shards"])
    assert sorted(p.name for p in made.folder.iterdir()) == [".dedistill", *SHARDS, "pairs.json"]


def test_images_come_again_from_the_stored_noise(made, teacher):
    """From the noise, the caption and the facts alone, every image and every point on the way to 1e-5."""
    noise, states, captions = zip(*everything(PairSource(made.folder)))
    noise, states = torch.from_numpy(np.stack(noise)), torch.from_numpy(np.stack(states))
    facts, sigmas = made.facts, sigma_grid(made.facts["steps"])
    images = sample(teacher, list(captions), noise, at(6, facts["cfg"]))
    torch.testing.assert_close(states[:, -1], images, rtol=0, atol=1e-5)
    (way,) = trajectories(teacher, list(captions), noise, at(6, facts["cfg"]))
    kept = [int(np.argmin(np.abs(sigmas - s))) for s in facts["sigmas"]]
    assert kept == [0, 2, 4, 6]
    torch.testing.assert_close(states, torch.stack([way[k] for k in kept], 1), rtol=0, atol=1e-5)
    assert torch.equal(states[:, 0], noise)
    other = sample(teacher, list(captions), noise, at(6))
    assert float((other - images).abs().max()) > 1e-3, "the scale must matter"


@pytest.mark.parametrize("mask", ["bool", "none"])
def test_a_different_teacher_has_another_hash(mask, teacher):
    """The hash follows the weights of the network and of the trained part, and nothing else."""
    adapter = {"adapter": {"kind": "lokr", "targets": [{"preset": "attention"}], "init": "perturbed_normal"}}
    first = teacher_hash(model())
    assert first == teacher_hash(teacher) != teacher_hash(model(seed=1))
    adapted, quantized = (model(**adapter, base={"quant": q}) for q in ("none", "int8-quanto"))
    hashes = [teacher_hash(m) for m in (adapted, quantized)]
    assert len({first, *hashes}) == 3 and hashes[0] == teacher_hash(model(**adapter))
    with torch.no_grad():
        next(iter(adapted.trainable().values())).view(-1)[0] += 1e-6
    assert teacher_hash(adapted) != hashes[0]


def test_making_again_changes_nothing(copy, teacher, digits):
    """A finished folder is left as it is, to the time of its files, and nothing is computed."""
    stamps = {p.name: p.stat().st_mtime_ns for p in copy.glob("*.tar")}
    calls = []
    facts = make_pairs(teacher, digits, copy, **SETTINGS, progress=lambda done, total: calls.append(done))
    assert facts["complete"] and calls == []
    assert {p.name: p.stat().st_mtime_ns for p in copy.glob("*.tar")} == stamps


def _delete_last(folder: Path) -> None:
    (folder / SHARDS[-1]).unlink()


def _cut_middle(folder: Path) -> None:
    raw = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(raw[: len(raw) // 2])


def _interrupt(folder: Path) -> None:
    """As it is when the second shard was being written: the facts know the first one."""
    facts = read_checksummed(folder / "pairs.json")
    (folder / "pairs.json").write_bytes(checksummed(facts | {"shards": facts["shards"][:1], "complete": False}))
    (folder / SHARDS[1]).rename(folder / f"{SHARDS[1]}.tmp-dedistill")
    (folder / SHARDS[2]).unlink()


def _forget(folder: Path) -> None:
    (folder / "pairs.json").unlink()


def _tear(folder: Path) -> None:
    raw = (folder / "pairs.json").read_text()
    (folder / "pairs.json").write_text(raw[: len(raw) // 2])


@pytest.mark.parametrize("damage", [_delete_last, _cut_middle, _interrupt, _forget, _tear])
def test_a_restart_gives_the_same_bytes(damage, made, copy, teacher, digits):
    """Whatever was lost is made again, byte for byte, and what was there is kept."""
    damage(copy)
    calls = []
    facts = make_pairs(teacher, digits, copy, **SETTINGS, progress=lambda done, total: calls.append(done))
    assert facts == made.facts and shards(copy) == shards(made.folder)
    assert (copy / "pairs.json").read_bytes() == (made.folder / "pairs.json").read_bytes()
    lost = {_delete_last: [40], _cut_middle: [32, 40], _interrupt: [32, 40]}.get(damage, [16, 32, 40])
    assert calls == lost


@pytest.mark.parametrize(
    "change",
    [{"cfg": 3.0}, {"steps": 12}, {"points": 2}, {"seed": 5}, {"count": 41}, {"teacher": "other"}, {"shard_size": 20}],
    ids=lambda c: next(iter(c)),
)
def test_other_settings_do_not_mix(change, copy, teacher, digits):
    """Pairs of another scale, solver grid, seed or teacher are refused, told by name and value, and left alone."""
    before = shards(copy)
    with pytest.raises(UserError, match="holds pairs made differently") as caught:
        make_pairs(teacher, digits, copy, **SETTINGS | change)
    (key, value), message = next(iter(change.items())), str(caught.value)
    named = "sigmas" if key == "points" else key
    assert f"{named}: " in message and (key == "points" or f"{SETTINGS[key]!r} there, {value!r} here" in message)
    assert shards(copy) == before


def test_a_shifted_teacher_walks_its_own_sigmas(copy, digits, tmp_path_factory):
    """sample.shift of the teacher's recipe moves the grid, is stored, and does not mix with another."""
    shifted = model(sample={"shift": 3.0})
    with pytest.raises(UserError, match=r"holds pairs made differently \(shift: 1\.0 there, 3\.0 here; sigmas: "):
        make_pairs(shifted, digits, copy, **SETTINGS)
    facts = make_pairs(shifted, digits, tmp_path_factory.mktemp("shifted"), **SETTINGS)
    assert facts["shift"] == 3.0 and facts["sigmas"] == pytest.approx([1, 6 / 7, 3 / 5, 0])


@pytest.mark.parametrize(("shift", "said"), [(1.0, ""), (2.5, "made at shift 1, and images are made at sample.shift = 2.5")])
@pytest.mark.parametrize("objective", ["distill", "reflow"])
def test_a_student_is_told_of_pairs_of_another_shift(objective, shift, said, made):
    """Where it learns the very points of the pairs; else it is timesteps.shift that differs."""
    tables = {"sample": {"shift": shift}, "train": {"steps": 1, "batch": 1, "lr": 1e-3, "objective": objective}}
    student = model(**tables)
    recipe = recipe_of(
        {
            "run": {"name": "a", "out": "a"},
            "model": {"family": "pixel_flux", "path": "a"},
            "data": {"source": "pairs", "path": str(made.folder)},
            **tables,
        }
    )
    notes = "".join(_shift_notes(recipe, student, PairSource(made.folder)))
    if objective == "reflow":
        said = "timesteps.shift = 1 in training, and sample.shift = 2.5" if shift != 1 else ""
    assert said in notes and bool(notes) == bool(said)


@pytest.mark.parametrize("points", [4, 5, 12])
def test_points_that_are_no_states_of_the_solver(points, tmp_path, teacher, digits):
    """Only states that were computed can be stored."""
    with pytest.raises(UserError, match=f"--points {points} does not divide --steps 6") as caught:
        make_pairs(teacher, digits, tmp_path / "out", **SETTINGS | {"points": points})
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_pairs_do_not_depend_on_shards(made, tmp_path, teacher, digits):
    """Pair i is the same, whatever shard it lies in and whichever pairs were computed with it."""
    make_pairs(teacher, digits, tmp_path, **SETTINGS | {"shard_size": 7})
    for one, other in zip(everything(PairSource(tmp_path)), everything(PairSource(made.folder))):
        assert one[2] == other[2] and np.array_equal(one[0], other[0])
        np.testing.assert_allclose(one[1], other[1], rtol=0, atol=1e-5)


def test_prompts_do_not_depend_on_their_number(digits):
    """Prompt i is the same in a set of another size, as noise i is, so that a larger set contains the smaller."""
    assert digits.prompts(0, 20)[:7] == digits.prompts(0, 7)


def test_every_pair_is_drawn_once_per_epoch_and_none_is_both(made):
    """Training and held-out pairs are disjoint and make up all; noise, image and caption go together."""
    source, stored = PairSource(made.folder), {}
    for i, pair in enumerate(everything(source)):
        stored[f"pairs/{i}"] = pair
    train = source.draw(0, 0, np.arange(len(source.train_ids)), len(source.train_ids))
    held_out = source.draw(0, 0, np.arange(len(source.held_out_ids)), len(source.held_out_ids), held_out=True)
    assert len(set(train.names)) == len(train.names) == 37 and len(set(held_out.names)) == 3
    assert set(train.names) | set(held_out.names) == stored.keys()
    for batch in (train, held_out):
        for k, name in enumerate(batch.names):
            noise, states, caption = stored[name]
            assert batch.captions[k] == caption and np.array_equal(batch.noise[k], noise)
            assert np.array_equal(batch.trajectory[k], states) and np.array_equal(batch.latents[k], states[-1])
    assert batch.trajectory_sigmas.tolist() == made.facts["sigmas"] and source.image == (1, 8, 16)
    later = [source.draw(0, step, np.arange(8), 8).names for step in range(5, 30)]
    assert not {n for names in later for n in names} & set(held_out.names)
    assert source.draw(0, 9, np.arange(3, 5), 8).names == source.draw(0, 9, np.arange(8), 8).names[3:5]
    assert source.draw(1, 9, np.arange(8), 8).names != source.draw(0, 9, np.arange(8), 8).names


def test_prompts_of_pairs_are_keyed_and_as_many_as_asked_for(made):
    """Stored captions with repetition, of training pairs, too, so that a reflowed model can make pairs again."""
    source = PairSource(made.folder)
    captions = [pair[2] for pair in everything(source)]
    prompts = source.prompts(3, 400)
    assert len(prompts) == 400 and set(prompts) == set(captions)
    assert prompts[:50] == source.prompts(3, 50) != source.prompts(4, 50)


def test_pairs_are_made_from_the_captions_of_pairs(made, teacher, tmp_path):
    """A second round of reflow, with more pairs than captions are held out."""
    source = PairSource(made.folder)
    make_pairs(teacher, source, tmp_path, **SETTINGS | {"count": 60})
    again = PairSource(tmp_path)
    assert [again._read(i)[2] for i in range(60)] == source.prompts(SETTINGS["seed"], 60)


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_shard_is_refused_by_name(damage, copy):
    """A flipped bit, a cut file and a lost one are found before anything is trained on them."""
    raw = bytearray((copy / SHARDS[1]).read_bytes())
    raw[5000] ^= 1
    (copy / SHARDS[1]).write_bytes(raw if damage == "bit" else raw[:4096])
    if damage == "gone":
        (copy / SHARDS[1]).unlink()
    with pytest.raises(UserError, match=rf"data\.path: shard '.*{SHARDS[1]}'.*(damaged|cannot be read)"):
        PairSource(copy)


def test_unfinished_missing_or_few_pairs_are_refused(copy, tmp_path_factory, teacher, digits):
    """The message says what is missing and which tool makes it."""
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=f"no pairs in '{empty}'.*dedistill pairs"):
        PairSource(empty)
    _interrupt(copy)
    with pytest.raises(UserError, match=r"is unfinished \(1 shard\); run dedistill pairs again"):
        PairSource(copy)
    make_pairs(teacher, digits, empty, **SETTINGS | {"count": 1})
    with pytest.raises(UserError, match="holds 1 pair"):
        PairSource(empty)


@pytest.mark.parametrize("array", [np.array([{}, None], dtype=object), np.zeros((3, 2)), np.array(["a", "b"]), b"no array"])
@pytest.mark.parametrize("part", ["noise.npy", "trajectory.npy"])
def test_pairs_of_others_are_refused_by_name(copy, array, part):
    shard, facts = copy / "00000.tar", read_checksummed(copy / "pairs.json")
    raw = io.BytesIO(array) if isinstance(array, bytes) else io.BytesIO()
    if not isinstance(array, bytes):
        np.save(raw, array, allow_pickle=True)
    with tarfile.open(shard) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(shard, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            data = raw.getvalue() if name.endswith(part) else data
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    facts["shards"][0]["sha256"] = file_sha256(shard)
    (copy / "pairs.json").write_bytes(checksummed(facts))
    with pytest.raises(UserError, match=f"data.path: pair 0 of '{copy}' cannot be read"):
        PairSource(copy)._read(0)
