"""What a run writes holds no secret of its environment, and no name leads out of its directory."""

import subprocess
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_shards import add, encoded
from ranks import run_ranks
from runs import arguments
from safetensors.torch import save

from dedistill.data.images.index import build_index
from dedistill.data.images.types import ImageSet
from dedistill.errors import UserError
from dedistill.evaluation.candidates import candidates_of
from dedistill.recipe import load_recipe
from dedistill.recipe.load import RecipeError
from dedistill.train import main

MARKS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "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",
    "AWS_SECRET_ACCESS_KEY": "awsMARKmarkMARKmarkMARK",
    "SOME_PASSWORD": "passwordMARKmarkMARKmark",
}


def found_in(folder: Path, marks: list[str]) -> list[str]:
    """Files, also compressed ones, that hold one of ``marks``."""
    hits = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        raw = file.read_bytes()
        with_unpacked = [raw]
        with suppress(zlib.error):
            with_unpacked.append(zlib.decompress(raw))
        hits += [f"{file}: {mark}" for mark in marks if any(mark.encode() in data for data in with_unpacked)]
    return hits


def test_no_secret_of_the_environment_is_written(adapter_recipe, tmp_path, monkeypatch):
    """Also with W&B, which looks at environment, command line and repository."""
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", repository], check=True)
    remote = "https://user:gitMARKmarkMARK@example.com/x.git"
    subprocess.run(["git", "-C", repository, "remote", "add", "origin", remote], check=True)
    monkeypatch.chdir(repository)
    for name, value in MARKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    words = arguments(adapter_recipe, out, "log.wandb=true", "checkpoint.every=1")
    codes = run_ranks(1, main, words, said=tmp_path / "printed")  # W&B is one per process
    printed = (tmp_path / "printed" / "0").read_text()
    assert codes == [0], printed
    assert list((out / "wandb").rglob("*.wandb")), "or W&B was not there at all"
    marks = [*MARKS.values(), "gitMARKmarkMARK"]
    assert found_in(out, marks) == []
    assert not [mark for mark in marks if mark in printed]
    (out / "planted").write_text(f"x {MARKS['HF_TOKEN']} y")
    assert len(found_in(out, marks)) == 1, "the search itself"


@pytest.mark.parametrize("key", ["log.api_key", "run.token", "model.hf-token", "train.password", "data.secret"])
def test_a_secret_in_a_recipe_is_refused_without_repeating_it(adapter_recipe, key):
    with pytest.raises(RecipeError, match="looks like a secret") as caught:
        load_recipe(adapter_recipe, [f"{key}={MARKS['HF_TOKEN']}"])
    assert MARKS["HF_TOKEN"] not in str(caught.value)


NAMES = ("../x", "/x", "..", ".", ".x", "a/b", "a\\b", "a\0b", "a\nb", "C:x", "", " ", "x" * 300, "\u202ex", "-rf")


@pytest.mark.parametrize("name", NAMES, ids=[ascii(n)[:20] for n in NAMES])
def test_a_name_of_a_run_is_a_plain_one(adapter_recipe, tmp_path, name):
    """It becomes the name of folders."""
    text = adapter_recipe.read_text()
    quoted = "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in name)
    adapter_recipe.write_text(text.replace('"tiny-dedistill"', f'"{quoted}"'))
    with pytest.raises(RecipeError, match=r"run\.name"):
        load_recipe(adapter_recipe)


def test_names_of_samples_are_only_names(tmp_path):
    """Members of tar files are never unpacked, whatever they are called."""
    import tarfile

    folder = tmp_path / "set"
    folder.mkdir()
    names = ("../../escaped", "/tmp/escaped-absolute", "a/../../escaped", "x" * 250, "C:\\escaped", "a b")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, name in enumerate(names):
            add(tar, f"{name}.jpg", encoded("JPEG", seed=i))
            add(tar, f"{name}.txt", b"a caption")
    index = build_index([ImageSet(str(folder), missing_captions="quarantine")], file=tmp_path / "cache" / "index.jsonl")
    assert len(index.samples) == len(names) and index.quarantined == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "set"] and not Path("/tmp/escaped-absolute.jpg").exists()
    for i in range(len(index.samples)):
        assert np.asarray(index.image(i)).shape == (24, 32, 3)


def test_names_of_candidates_come_from_the_run_directory(adapter_recipe, tmp_path):
    """A name that leads elsewhere is none."""
    recipe = load_recipe(adapter_recipe)
    posthoc = Path(recipe.run.out) / "posthoc"
    posthoc.mkdir(parents=True)
    (posthoc / "a.safetensors").write_bytes(save({"w": torch.ones(1)}))
    (tmp_path / "outside.safetensors").write_bytes(save({"w": torch.ones(1)}))
    for name in ("../../outside", str(tmp_path / "outside"), "..", "a\0", "a/../a", "x" * 5000):
        with pytest.raises(UserError, match="no candidate"):
            candidates_of(recipe, [name])
