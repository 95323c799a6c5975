"""Stored pairs: what is kept with them, whether they can be made again, and what is refused."""

import io
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from ranks import run_ranks
from samplings import at
from tiny_recipes import TEACHER

from dedistill.cli.main import main
from dedistill.cli.train import _shift_notes
from dedistill.data.digits import DigitSource, load_digits
from dedistill.data.pairs import HEADER, ROWS, PairSource, open_shard
from dedistill.distributed.launcher import start
from dedistill.errors import UserError
from dedistill.flow.schedule import ABOVE
from dedistill.flow.solvers import sigma_grid
from dedistill.io.atomic import checksummed, read_checksummed
from dedistill.io.ownership import hold
from dedistill.models.model import Model, build_model
from dedistill.models.sd15 import full_config
from dedistill.models.unet.tiny import write_tiny_unet
from dedistill.recipe import load_recipe
from dedistill.recipe.resolve import recipe_of
from dedistill.sampling import pairs
from dedistill.sampling.pairs import front_of, quarantine, teacher_hash
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
    """Noise, states and caption of each pair."""
    return [(states[0], states, caption) for states, caption in map(source.read, range(len(source)))]


def test_the_facts_are_stored(made):
    """Scale, solver, steps, negative prompt and teacher, beside the hash of every shard."""
    facts = read_checksummed(made.folder / "pairs.json")
    assert facts == made.facts and facts["complete"] is True
    assert {k: facts[k] for k in ("teacher", "cfg", "steps", "seed", "count", "shard_size")} == {
        k: v for k, v in SETTINGS.items() if k != "points"
    }
    assert (
        facts["solver"] == "euler"
        and facts["negative_prompt"] == ""
        and facts["image"] == [1, 8, 16]
        and facts["prediction"] == "flow"
    )
    assert facts["sigmas"] == pytest.approx([1, 2 / 3, 1 / 3, 0]) and facts["source"] == "digits"
    assert [(s["file"], s["pairs"]) for s in facts["shards"]] == list(zip(SHARDS, (16, 16, 8)))
    same = {k: v for k, v in facts.items() if k not in ("shards", "complete")}
    assert all(open_shard(made.folder / name).header["facts"] == same for name in SHARDS)
    assert sorted(p.name for p in made.folder.iterdir()) == [".dedistill", ".lock", *SHARDS, "pairs.json"]


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
    assert len(calls) == {_delete_last: 1, _cut_middle: 1, _interrupt: 2}.get(damage, 0) and calls[-1:] in ([], [40])


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
    train = source.slots(0, 0, len(source.train_ids))
    held_out = source.slots(0, 0, len(source.held_out_ids), held_out=True)
    assert len(set(train)) == len(train) == 37 and len(set(held_out)) == 3
    assert {slot.name for slot in train + held_out} == stored.keys()
    for slots in (train, held_out):
        batch = source.draw(slots)
        for k, slot in enumerate(slots):
            noise, states, caption = stored[slot.name]
            assert batch.captions[k] == caption and np.array_equal(batch.noise[k], noise)
            assert np.array_equal(batch.trajectory[k], states) and np.array_equal(batch.latents[k], states[-1])
    assert batch.trajectory_sigmas.tolist() == made.facts["sigmas"] and source.image == (1, 8, 16)
    assert not {slot for step in range(5, 30) for slot in source.slots(0, step, 8)} & set(held_out)
    assert source.slots(0, 9, 8) == source.slots(0, 9, 8) != source.slots(1, 9, 8)


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
    assert [again.read(i)[1] for i in range(60)] == source.prompts(SETTINGS["seed"], 60)


@pytest.mark.parametrize("damage", ["table", "header", "cut", "end", "longer", "gone", "empty"])
def test_a_damaged_shard_is_refused_by_name(damage, copy):
    """A flipped bit in what it says of its pairs, a cut file and a lost one are found when the set is opened."""
    file = copy / SHARDS[1]
    raw = bytearray(file.read_bytes())
    raw[{"table": file_offset(file, ROWS) + 200, "header": file_offset(file, HEADER) + 5}.get(damage, 0)] ^= 1
    file.write_bytes({"cut": file.read_bytes()[:9000], "end": raw[:-600], "longer": raw + b" ", "empty": b""}.get(damage, raw))
    if damage == "gone":
        file.unlink()
    with pytest.raises(UserError, match=rf"data\.path: shard '.*{SHARDS[1]}'.*(damaged|cannot be read)"):
        PairSource(copy)


@pytest.mark.parametrize("ext", ["states.npy", "txt"])
def test_a_damaged_pair_is_refused_by_name(ext, copy):
    """A flipped bit of a pair, or of its caption, is found before it is trained on; the others are as they were."""
    file = copy / SHARDS[1]
    raw = bytearray(file.read_bytes())
    raw[file_offset(file, f"00000020.{ext}") + (2000 if ext != "txt" else 1)] ^= 1
    file.write_bytes(raw)
    source = PairSource(copy)
    with pytest.raises(UserError, match=rf"shard '.*{SHARDS[1]}' is damaged \(pair 20 differs"):
        source.read(20)
    assert source.read(19)[1] and source.read(21)[1]


def test_damaged_shards_are_made_again(made, copy, teacher, digits):
    """The same command finds a pair, a table of pairs and an end that are not what was written, and mends them."""
    for name, place in zip(SHARDS[1:], ("00000021.states.npy", ROWS)):
        raw = bytearray((copy / name).read_bytes())
        raw[file_offset(copy / name, place) + 130] ^= 4
        (copy / name).write_bytes(raw)
    (copy / SHARDS[0]).write_bytes((copy / SHARDS[0]).read_bytes()[:-1])
    assert make_pairs(teacher, digits, copy, **SETTINGS) == made.facts
    assert shards(copy) == shards(made.folder)


def test_a_shard_of_other_pairs_is_refused_by_name(made, copy, teacher, digits, tmp_path_factory):
    """Of another scale or teacher, put among the others: when pairs are made again, and when they are trained on."""
    for change, told in (({"cfg": 4.0}, "cfg: 4.0 there, 2.5 here"), ({"teacher": "x"}, "teacher: 'x' there, 'hash' here")):
        other = tmp_path_factory.mktemp("other")
        make_pairs(teacher, digits, other, **SETTINGS | change)
        (copy / SHARDS[1]).write_bytes((other / SHARDS[1]).read_bytes())
        with pytest.raises(UserError, match=f"{SHARDS[1]}' holds pairs made differently \\({told}\\)"):
            make_pairs(teacher, digits, copy, **SETTINGS)
        with pytest.raises(UserError, match=f"shard '.*{SHARDS[1]}' was made differently.*{next(iter(change))}: "):
            PairSource(copy)


def file_offset(file: Path, name: str) -> int:
    with tarfile.open(file) as tar:
        return tar.getmember(name).offset_data


def test_a_shard_is_a_set_of_webdataset(made):
    """Its readers see the pairs alone, and the very numbers."""
    read = list(webdataset.WebDataset(str(made.folder / SHARDS[2]), shardshuffle=False).decode())
    own = everything(PairSource(made.folder))[32:]
    assert [(s["__key__"], s["txt"]) for s in read] == [(f"{i:08d}", c) for i, (_, _, c) in enumerate(own, 32)]
    assert all(np.array_equal(s["states.npy"], states) for s, (_, states, _) in zip(read, own))


def test_a_million_pairs_are_opened_at_once(tmp_path):
    """In a second or two, and without an object for each."""
    facts = {"sigmas": [1.0, 0.0], "image": [4, 64, 64], "teacher": "t"}
    account = {"facts": facts, "quarantined": {}, "rounding": {"rms": 0.0, "most": 0.0}}
    front, size = front_of(account, range(5000), 65664, [77] * 5000, [1] * 5000)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, data in front.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for number in range(200):
        with open(tmp_path / f"{number}.tar", "wb") as f:
            f.write(raw.getvalue())
            f.truncate(size)
    sha = open_shard(tmp_path / "0.tar").sha256
    shards = [{"file": f"{number}.tar", "sha256": sha} for number in range(200)]
    (tmp_path / "pairs.json").write_bytes(checksummed({**facts, "shards": shards, "complete": True}))
    tracemalloc.start()
    start = time.process_time()
    source = PairSource(tmp_path)
    slots = source.slots(0, 12, 1024)
    taken, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 1_000_000 and len(set(slots)) == 1024
    assert taken < 2 and peak < 100e6
    with pytest.raises(UserError, match="pair 999999 differs"):  # zeros, at the very end of the last
        source.read(999_999)


def test_the_last_shard_may_hold_one_pair(teacher, digits, tmp_path):
    make_pairs(teacher, digits, tmp_path, **SETTINGS | {"count": 9, "shard_size": 4})
    assert [len(open_shard(tmp_path / name).rows) for name in SHARDS] == [4, 4, 1]


def _make(folder: Path, teacher: Model, digits: DigitSource) -> int:
    _, world = start(cpu=True)
    try:
        make_pairs(teacher, digits, folder, **SETTINGS, world=world)
    except UserError as e:
        print(f"refused: {e}")
        return 1
    return 0


@pytest.mark.parametrize("damage", [None, "_interrupt", "_delete_first"])
def test_any_number_of_processes_makes_the_same_bytes(damage, made, copy, teacher, digits, tmp_path):
    """Two of them, from the start or after a kill."""
    folder = copy if damage else tmp_path / "new"
    if damage:
        globals()[damage](folder)
    assert run_ranks(2, _make, folder, teacher, digits, said=tmp_path / "said") == [0, 0]
    assert shards(folder) == shards(made.folder)
    assert (folder / "pairs.json").read_bytes() == (made.folder / "pairs.json").read_bytes()


def test_two_do_not_work_in_one_folder(copy, teacher, digits):
    with hold(copy, "--out"), pytest.raises(UserError, match="another process is running in"):
        make_pairs(teacher, digits, copy, **SETTINGS)


def _delete_first(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_cannot_be_trained_on_is_found(dtype):
    states = torch.randn(40, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert quarantine(states, dtype)[0] == {}
    states[3, 1, 0, 0, 0], states[7, 2, 0, 1, 1] = torch.nan, -torch.inf
    states[11, 0] = 1e5  # more than 16 bits hold
    states[20, 2] *= 30
    states[21, 1] *= 30  # a point on the way may be strong
    bad, middle = quarantine(states, dtype)
    assert bad.keys() == {3, 7, 20} | ({11} if dtype is torch.float16 else set())
    assert bad[3] == bad[7] == "not finite" and bad[20].startswith("saturated") and 0.8 < middle < 1.2


def test_bad_pairs_are_left_out_and_counted(monkeypatch, teacher, digits, tmp_path):
    """And nothing of the others changes; a shard of which most is bad ends it."""
    whole = everything(PairSource(made_in(tmp_path / "whole", teacher, digits)))
    walk = pairs.trajectories

    def spoilt(which):
        def states(model, captions, noise, sampling):
            for chunk in walk(model, captions, noise, sampling):
                for i in which:
                    chunk[-1][i] = torch.nan
                yield chunk

        return states

    monkeypatch.setattr(pairs, "trajectories", spoilt([1, 5]))
    folder = made_in(tmp_path / "some", teacher, digits)
    source, facts = PairSource(folder), read_checksummed(folder / "pairs.json")
    assert [s["quarantined"] for s in facts["shards"]] == [2, 2, 2] and len(source) == 34
    assert source.left_out() == {str(i): "not finite" for i in (1, 5, 17, 21, 33, 37)}
    kept = [pair for i, pair in enumerate(whole) if str(i) not in source.left_out()]
    assert all(a[2] == b[2] and np.array_equal(a[1], b[1]) for a, b in zip(everything(source), kept, strict=True))
    monkeypatch.setattr(pairs, "trajectories", spoilt(range(5)))
    with pytest.raises(UserError, match=r"shard 2: 5 pairs of 8 cannot be used, e\.g\. pair 32: not finite.*--cfg 2\.5"):
        made_in(tmp_path / "most", teacher, digits)


def made_in(folder: Path, teacher: Model, digits: DigitSource) -> Path:
    make_pairs(teacher, digits, folder, **SETTINGS)
    return folder


def test_latents_are_stored_in_16_bits_and_their_noise_exactly(tmp_path, digits):
    """Of a network with a codec; what that changes is measured, and no more than half a unit of the last place."""
    write_tiny_unet(tmp_path / "sd15", full_config("", False), full_depth=False)
    tables = {"family": "sd15", "path": str(tmp_path / "sd15")}
    recipe = recipe_of(
        {
            "run": {"name": "a", "out": "a"},
            "model": tables,
            "data": {"source": "digits"},
            "train": {"steps": 1, "batch": 1, "lr": 1e-3},
            "sample": {"height": 16, "width": 16},
        }
    )
    teacher, how = build_model(recipe), SETTINGS | {"count": 6, "steps": 2, "points": 2, "cfg": 1.5}
    facts = make_pairs(teacher, digits, tmp_path / "pairs", **how)
    source = PairSource(tmp_path / "pairs")
    assert (facts["dtype"], facts["prediction"], facts["above_range"]) == ("float16", "epsilon", ABOVE)
    noise, stored, captions = zip(*everything(source))
    noise = torch.from_numpy(np.stack(noise))
    assert torch.equal(noise, noise.half().float())
    (way,) = trajectories(teacher, list(captions), noise, at(2, 1.5))
    exact, stored = torch.stack(way, 1), torch.from_numpy(np.stack(stored))
    error = (stored - exact).double()
    share = float(error.square().mean().sqrt() / exact.double().square().mean().sqrt())
    rms, most = source.rounding()
    assert rms == pytest.approx(share, rel=1e-3) and most == pytest.approx(float(error.abs().max()), rel=1e-3)
    assert 1e-5 < rms < 2**-11 and torch.equal(stored, exact.half().float())


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
def test_pairs_of_others_are_refused_by_name(copy, array):
    raw, facts = io.BytesIO(), read_checksummed(copy / "pairs.json")
    if isinstance(array, bytes):
        raw.write(array)
    else:
        np.save(raw, array, allow_pickle=True)
    header, state, text = open_shard(copy / SHARDS[0]).header, raw.getvalue(), b"3 seven"
    front, _ = front_of(header, [0, 1], len(state), [len(text)] * 2, [zlib.crc32(text, zlib.crc32(state))] * 2)
    with tarfile.open(copy / SHARDS[0], "w") as tar:
        for name, data in (*front.items(), ("0.states.npy", state), ("0.txt", text), ("1.states.npy", state), ("1.txt", text)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    facts["shards"][0]["sha256"] = open_shard(copy / SHARDS[0]).sha256
    (copy / "pairs.json").write_bytes(checksummed(facts))
    with pytest.raises(UserError, match=f"data.path: pair 0 of '{copy}' cannot be read"):
        PairSource(copy).read(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The recipe of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "teacher.toml").write_text(TEACHER.format(out=folder, steps=1))
    assert main(["train", str(folder / "teacher.toml")]) == 0
    return folder / "teacher.toml"


PROMPTS = {
    "prompts.txt": "3 seven\n\n5 one\n",
    "prompts.csv": "id,prompt\n1,3 seven\n2,\n3,5 one\n",
    "prompts.jsonl": '{"caption": ["3 seven", "5 one"], "url": "a"}\n',
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_come_from_a_file(name, trained, tmp_path, capsys):
    """A line, or a cell of a table, each; they come again from other noise. The page shows pairs and how they were made."""
    (tmp_path / name).write_text(PROMPTS[name])
    small = ["--count", "5", "--steps", "2", "--points", "2", "--prompts", str(tmp_path / name)]
    assert main(["pairs", str(trained), "--out", str(tmp_path / "pairs"), *small]) == 0
    assert "5, 2 of them different" in capsys.readouterr().err
    source = PairSource(tmp_path / "pairs")
    assert [caption for _, _, caption in everything(source)] == ["3 seven", "5 one", "3 seven", "5 one", "3 seven"]
    assert len({states.tobytes() for _, states, _ in everything(source)}) == 5 and source.facts["source"] == name
    page = (tmp_path / "pairs" / "index.html").read_text()
    assert page.count('<a class="shot"') == 15 and source.facts["teacher"] in page and "5 one" in page


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.csv", "left,right\nx,y\n", "several columns of text"),
        ("a.csv", "prompt\n\n", "holds no prompts"),
        ("a.jsonl", '{"prompt": [3]}', "cannot be read: 'prompt' holds a int"),
        ("a.parquet", "no table", "cannot be read"),
        ("a.txt", "\n", "holds no prompts"),
    ],
)
def test_a_file_without_prompts_is_refused(name, text, said, trained, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main(["pairs", str(trained), "--out", str(tmp_path / "pairs"), "--prompts", str(tmp_path / name)]) in (1, 2)
    message = capsys.readouterr().err
    assert f"error: --prompts: '{tmp_path / name}'" in message and said in message and not (tmp_path / "pairs").exists()


def test_the_base_of_a_recipe_makes_pairs(trained, tmp_path):
    """The model that training starts from, not the one it ends with."""
    small = ["--count", "4", "--steps", "2", "--points", "2"]
    for words, out in (([], "finished"), (["--base"], "base")):
        assert main(["pairs", str(trained), *words, "--out", str(tmp_path / out), *small]) == 0
    one, other = (PairSource(tmp_path / out) for out in ("finished", "base"))
    assert other.facts["teacher"] == teacher_hash(build_model(load_recipe(trained))) != one.facts["teacher"]
