"""A run whose images, pairs or base lie elsewhere now: the same bytes go on, other ones do not, whatever their path."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from tiny_recipes import IMAGES

from dedistill.data.encode import open_source
from dedistill.data.images import decode
from dedistill.io.atomic import checksummed, read_checksummed
from dedistill.recipe import load_recipe
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.runs.model import open_finished
from dedistill.sampling.pairs import make_pairs
from dedistill.sampling.sampler import Sampling
from dedistill.train import main
from dedistill.training.guards import Guard, of_renamed_sets


def folder(photos: Path, root: Path) -> Path:
    return shutil.copytree(photos, root / "photos")


def split_folders(photos: Path, root: Path) -> Path:
    for i, file in enumerate(sorted(photos.iterdir())):
        place = root / "set" / ("train" if i % 4 < 2 else "test") / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return root / "set"


def shards(photos: Path, root: Path) -> Path:
    (root / "shards").mkdir()
    files = sorted(photos.iterdir())
    for n in range(2):
        with tarfile.open(root / "shards" / f"{n}.tar", "w") as tar:
            for file in files[n * len(files) // 2 : (n + 1) * len(files) // 2]:
                tar.add(file, arcname=file.name)
    return root / "shards"


def one_shard(photos: Path, root: Path) -> Path:
    (root / "tars").mkdir()
    with tarfile.open(root / "tars" / "a.v1.tar", "w") as tar:
        for file in sorted(photos.iterdir()):
            tar.add(file, arcname=file.name)
    return root / "tars" / "a.v1.tar"


def table(photos: Path, root: Path) -> Path:
    """With absolute paths below its own folder, as programs write them."""
    place = shutil.copytree(photos, root / "listed")
    rows = [{"file_name": str(place / f.name), "text": f"caption of {f.stem}"} for f in sorted(place.glob("*.png"))]
    (place / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "list.jsonl"


def rename(path: Path, root: Path) -> Path:
    """The folder, or the folder of the file, under another name on the same disk."""
    top = path if path.is_dir() else path.parent
    new = top.rename(root / "renamed.v2")
    return new if top == path else new / path.name


def another_disk(path: Path, root: Path) -> Path:
    """A copy with other inodes and times below another folder; what it was made of is gone, or another set."""
    top = path if path.is_dir() else path.parent
    new = shutil.copytree(top, root / "mnt" / "data" / top.name, copy_function=shutil.copyfile)
    shutil.rmtree(top)
    return new if top == path else new / path.name


def write(file: Path, images: Path, base: Path, name: str = "run") -> Path:
    text = IMAGES.format(out=file.parent, base=base, images=images, cache=file.parent / "cache")
    crops = 'crops = ["square", "random_aspect"]\ncrops_per_picture = 2\nmax_upscale = 4.0\nresolutions'
    file.write_text(text.replace("resolutions", crops).replace('/run"', f'/{name}"'))
    return file


def numbers(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(recipe: Path, count: int) -> list[str]:
    return [str(recipe), "--set", f"train.steps={count}"]


def with_other_root(images: Path, before: Path) -> None:
    """The table's own paths, put right by its user."""
    if images.suffix == ".jsonl":
        images.write_text(images.read_text().replace(str(before.parent), str(images.parent)))


@pytest.mark.parametrize(
    ("layout", "move"),
    [
        (folder, rename),
        pytest.param(folder, another_disk, marks=pytest.mark.slow),
        (split_folders, another_disk),
        (shards, rename),
        (one_shard, another_disk),
        (table, another_disk),
    ],
)
def test_moved_images_are_the_same_images(tmp_path, tiny_flux, photos, capsys, monkeypatch, layout, move):
    """Nothing is decoded or encoded again, and the run is that of images which never moved, to the last bit."""
    images = layout(photos, tmp_path)
    recipe = write(tmp_path / "r.toml", images, tiny_flux)
    assert main(steps(recipe, 2)) == 0
    assert main([*steps(recipe, 4), "--set", f"run.out={tmp_path / 'unmoved'}"]) == 0
    moved = move(images, tmp_path)
    with_other_root(moved, images)
    write(recipe, moved, tiny_flux)
    capsys.readouterr()
    monkeypatch.setattr(decode, "decode", None)
    assert main(steps(recipe, 4)) == 0
    heard = capsys.readouterr().err
    assert "continued from step 2" in heard and "encoded" not in heard
    assert f"data.sets.0.path: what was at '{images}' is at '{moved}' now" in heard
    assert numbers(tmp_path / "run") == numbers(tmp_path / "unmoved")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]["sets"][0]["path"] == str(moved)


def test_other_images_at_another_path_are_refused(tmp_path, tiny_flux, photos, capsys):
    """The run's own record stays as it was, and the right images are gone on with."""
    images = folder(photos, tmp_path)
    recipe = write(tmp_path / "r.toml", images, tiny_flux)
    assert main(steps(recipe, 2)) == 0
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("recipe.json", "recipe.toml", "inputs.json")}
    for other in ("an image", "a caption", "one more"):
        wrong = shutil.copytree(images, tmp_path / other)
        if other == "a caption":
            (wrong / "p03.txt").write_text("something else")
        else:
            shutil.copy(wrong / "p01.png", wrong / ("p03.png" if other == "an image" else "q.png"))
            (wrong / "q.txt").write_text("one more")
        write(recipe, wrong, tiny_flux)
        capsys.readouterr()
        assert main(steps(recipe, 4)) == 1
        assert "images, captions or crops differ from those that the run in" in capsys.readouterr().err, other
        assert kept == {name: (tmp_path / "run" / name).read_bytes() for name in kept}
    write(recipe, rename(images, tmp_path), tiny_flux)
    assert main(steps(recipe, 4)) == 0


@pytest.mark.parametrize("keep", [True, False])
def test_a_moved_base_is_the_same_base(tmp_path, tiny_flux, photos, capsys, keep):
    """Its encoders too: nothing is encoded again. keep: where it was there is still a copy."""
    base = shutil.copytree(tiny_flux, tmp_path / "base")
    recipe = write(tmp_path / "r.toml", photos, base)
    assert main([*steps(recipe, 2), "--set", "snapshot.every=1"]) == 0
    moved = shutil.copytree(base, tmp_path / "deep" / "another name")
    if not keep:
        shutil.rmtree(base)
    write(recipe, photos, moved)
    capsys.readouterr()
    assert main([*steps(recipe, 4), "--set", "snapshot.every=1"]) == 0
    heard = capsys.readouterr().err
    assert "continued from step 2" in heard and "encoded" not in heard
    assert open_finished(load_recipe(recipe), tmp_path / "run" / "snapshots" / "step-00000001.safetensors")


def test_another_base_at_another_path_is_refused(tmp_path, tiny_flux, photos, capsys):
    recipe = write(tmp_path / "r.toml", photos, tiny_flux)
    assert main(steps(recipe, 2)) == 0
    for hurt in ("transformer", "vae", "text_encoder"):
        other = shutil.copytree(tiny_flux, tmp_path / hurt)
        file = next((other / hurt).glob("*.safetensors"))
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        write(recipe, photos, other)
        capsys.readouterr()
        assert main(steps(recipe, 4)) == 1
        heard = capsys.readouterr().err
        named = "model.path: 1 file differs" in heard and str(file) in heard
        assert named or (hurt != "transformer" and "is stale" in heard), hurt


def test_moved_pairs_are_the_same_pairs(teacher_recipe, tmp_path, capsys):
    assert main([str(teacher_recipe)]) == 0
    recipe, made = load_recipe(teacher_recipe), tmp_path / "pairs"
    settings = {"teacher": "x", "count": 16, "sampling": Sampling(steps=2), "points": 2, "shard_size": 16}
    make_pairs(open_finished(recipe), open_source(recipe.data), made, **settings, seed=0)

    def student(folder: Path, count: int) -> list[str]:
        values = ["data.source=pairs", f"data.path={folder}", "data.caption_noise=0.0", "train.objective=distill"]
        settings = [f"run.out={tmp_path / 's'}", f"train.steps={count}", *values]
        return [str(teacher_recipe), *(a for v in settings for a in ("--set", v))]

    assert main(student(made, 4)) == 0
    moved = made.rename(tmp_path / "elsewhere")
    assert main(student(moved, 6)) == 0
    make_pairs(open_finished(recipe), open_source(recipe.data), tmp_path / "others", **settings, seed=1)
    capsys.readouterr()
    assert main(student(tmp_path / "others", 8)) == 1
    assert "data.path: 1 file differs" in capsys.readouterr().err


def test_what_is_in_quarantine_stays_there_under_another_name(tmp_path, tiny_flux, photos):
    """Of a renamed folder; the run goes on as if it had its old name."""
    images = folder(photos, tmp_path)
    recipe = write(tmp_path / "r.toml", images, tiny_flux)
    assert main(steps(recipe, 2)) == 0
    manifest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "manifest.json"
    facts = read_checksummed(manifest)
    size = "[64 x 64]"
    bad = [f"photos/p{i:02}.png {size}" for i in range(0, 12, 2)]
    facts["guard"]["quarantine"] = {name: {"since": 2, "sigma": 0.5, "loss": "nan"} for name in bad}
    facts["guard"]["hits"] = {"photos/p01.png": [1]}
    manifest.write_bytes(checksummed(facts))
    shutil.copytree(tmp_path / "run", tmp_path / "unmoved")
    assert main([*steps(recipe, 6), "--set", f"run.out={tmp_path / 'unmoved'}"]) == 0
    write(recipe, rename(images, tmp_path), tiny_flux)
    assert main(steps(recipe, 6)) == 0
    guard = read_checksummed(list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "manifest.json")["guard"]
    assert set(guard["quarantine"]) == {name.replace("photos/", "renamed.v2/") for name in bad}
    unmoved = (tmp_path / "unmoved" / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == unmoved.replace("photos/", "renamed.v2/")


def test_samples_of_renamed_sets_are_told_apart():
    """Also where two sets exchange their names, and where a name only begins like another."""
    guard = Guard(4.0)
    guard.hits = {"a/x.png [64 x 64]": [3], "ab/x.png": [4], "b/a/x.png": [5]}
    guard.suspects = {"a/s::k.png": {"sample": "a/s::k.png", "sigma": 0.5, "loss": "nan"}}
    guard.quarantine = {"b/y": {"since": 1, "sigma": 0.1, "loss": "9"}}
    found = of_renamed_sets(guard.state(), {"a": "b", "b": "a"})
    assert found["hits"] == {"b/x.png [64 x 64]": [3], "ab/x.png": [4], "a/a/x.png": [5]}
    assert found["suspects"] == {"b/s::k.png": {"sample": "b/s::k.png", "sigma": 0.5, "loss": "nan"}}
    assert found["quarantine"].keys() == {"a/y"} and guard.quarantine.keys() == {"b/y"}
