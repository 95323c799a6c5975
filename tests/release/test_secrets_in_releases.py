"""A release holds the model and nothing else: no credentials, code or pickles."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from tiny_recipes import PICTURES

from dedistill.train import main

TOOLS = Path(__file__).parents[2] / "tools"
TOKEN = "hf_markMARKmark"
PLACE = "jane-acme"
"""Part of every path of the run below: a user and a client."""


@pytest.fixture(scope="module")
def home(tmp_path_factory, photos) -> Path:
    """``base``, a pipeline folder as diffusers saves one again, and a run on it with two snapshots, all below PLACE."""
    from dedistill.families.flux_tiny import write_tiny_flux

    folder = tmp_path_factory.mktemp("home") / PLACE
    write_tiny_flux(folder / "first")
    FluxPipeline.from_pretrained(folder / "first", local_files_only=True).save_pretrained(folder / "base")
    assert PLACE in (folder / "base/vae/config.json").read_text(), "or there is nothing to hide"
    pictures = shutil.copytree(photos, folder / "unreleased-product")
    recipe = PICTURES.format(out=folder, base=folder / "base", pictures=pictures, cache=folder / "cache")
    (folder / "r.toml").write_text(recipe.replace("[train]", 'name = "product"\n[train]') + "[snapshot]\nevery = 1\n")
    assert main([str(folder / "r.toml"), "--debug"]) == 0
    save_file(load_file(folder / "run/snapshots/step-00000002.safetensors"), folder / "tensors.safetensors")
    return folder


def tool(name: str, *arguments: object) -> int:
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv = before
    return 0


def export(source: Path, out: Path, form: str = "diffusers", *more: object) -> int:
    return tool("export_model", source, "--format", form, "--out", out, *more)


def merge(home: Path, out: Path, base: Path | None = None, weights: Path | None = None) -> int:
    """Of the run's last snapshot into its base; or its tensors alone, which belong to no base, into another folder."""
    weights = weights or home / ("tensors.safetensors" if base else "run/snapshots/step-00000002.safetensors")
    chosen = ["--set", f"model.path={base}"] if base else []
    return tool("merge_adapter", home / "r.toml", "--weights", weights, "--out", out, *chosen)


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def telling(folder: Path, *marks: str) -> list[str]:
    """Files of a release that hold one of ``marks``."""
    return [str(p) for p in folder.rglob("*") if p.is_file() and any(m.encode() in p.read_bytes() for m in marks)]


LOOT = (
    *(".git/config", ".git/lfs/objects/ab/weights", ".env", ".huggingface/token.json", "text_encoder/.netrc.json"),
    *("vae/.hidden/config.json", "pipeline.py", "old.ckpt", "notes/private.txt", "scheduler/evil.py"),
    *("text_encoder/pytorch_model.bin", "tokenizer/key.pem", "transformer/modeling.py", "training_args.json"),
)


def clone(home: Path, folder: Path) -> Path:
    """The base as a clone with credentials, and with what else gathers in such folders."""
    shutil.copytree(home / "base", folder)
    for name in LOOT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"url = https://me:{TOKEN}@huggingface.co/x")
    (folder / "LICENSE.md").write_text("terms")
    (folder / "text_encoder_2/NOTICE").write_text("terms")
    return folder


@pytest.mark.parametrize("way", ["export", "merge and export"])
def test_a_release_holds_the_model_alone(way, home, tmp_path, capsys):
    """Every file of it is one that was asked for, whether the folder itself was cloned or the base it points to."""
    base = source = clone(home, tmp_path / "base")
    made = {"README.md", "LICENSE.md", "text_encoder_2/NOTICE"}
    if way != "export":
        source = tmp_path / "merged"
        assert merge(home, source, base) == 0
        assert not telling(source, TOKEN)
        made |= {"merge.json", "dedistill.json"}
    assert export(source, tmp_path / "out") == 0
    assert files_in(tmp_path / "out") == files_in(home / "base") | made
    assert not telling(tmp_path / "out", TOKEN)
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 1 and "old.ckpt" in said[0] and ".git" not in said[0] and "more" in said[0]
    FluxPipeline.from_pretrained(tmp_path / "out", local_files_only=True)


def test_folders_that_the_index_names_are_components(home, tmp_path, capsys):
    """Such as a second VAE, but nothing hidden or elsewhere; and nothing is said where nothing is missing."""
    shutil.copytree(home / "base", tmp_path / "base")
    shutil.copytree(home / "base/vae", tmp_path / "base/decoder")
    index = json.loads((home / "base/model_index.json").read_text())
    for name in ("base/.git", "private"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"token": TOKEN}))
    named = ("decoder", ".git", "../private", str(tmp_path / "private"))
    (tmp_path / "base/model_index.json").write_text(json.dumps(index | {n: ["diffusers", "AutoencoderKL"] for n in named}))
    assert export(tmp_path / "base", tmp_path / "out", "int8") == 0
    assert "decoder/diffusion_pytorch_model.safetensors" in files_in(tmp_path / "out")
    assert not telling(tmp_path / "out", TOKEN)
    assert "left out" not in capsys.readouterr().err


def test_weights_that_are_only_a_pickle_are_not_lost_in_silence(home, tmp_path, capsys):
    shutil.copytree(home / "base", tmp_path / "base")
    (tmp_path / "base/text_encoder/model.safetensors").rename(tmp_path / "base/text_encoder/pytorch_model.bin")
    assert export(tmp_path / "base", tmp_path / "out") == 1
    assert "text_encoder/pytorch_model.bin' is a pickle" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["home", "a VAE alone"])
def test_components_are_taken_from_a_pipeline_only(kind, home, tmp_path, capsys):
    """A folder from elsewhere says where its encoders are; that is no leave to publish any folder here."""
    shutil.copytree(home / "base", tmp_path / "base")
    private = tmp_path / "private"
    (private / "vae").mkdir(parents=True)
    (private / "id_rsa.txt").write_text(TOKEN)
    (private / "vae/keys.json").write_text(json.dumps(TOKEN))
    if kind != "home":
        (private / "vae/config.json").write_text("{}")
    (tmp_path / "base/dedistill.json").write_text(json.dumps({"components": str(private)}))
    assert export(tmp_path / "base", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert str(private) in said and "no pipeline folder" in said and not list(tmp_path.glob("out*"))


def leading_out(kind: str, folder: Path, outside: Path) -> Path:
    """Put a link of some kind into model folder ``folder``; returns it."""
    (outside / "there").mkdir(parents=True)
    (outside / "there/scheduler_config.json").write_text(json.dumps({"shift": 1.0, "password": TOKEN}))
    (folder / ".git").mkdir()
    (folder / ".git/config.json").write_text(json.dumps({"password": TOKEN}))
    (folder / "old.ckpt").write_text(TOKEN)
    link, target = {
        "a file": ("scheduler/notes.txt", outside / "there/scheduler_config.json"),
        "a config": ("scheduler/scheduler_config.json", outside / "there/scheduler_config.json"),
        "a folder": ("scheduler", outside / "there"),
        "over two links": ("scheduler/a.json", folder / "b.json"),
        "hidden": ("scheduler/a.json", "../.git/config.json"),
        "another kind": ("scheduler/a.json", "../old.ckpt"),
        "nothing": ("scheduler/a.json", "gone.json"),
        "itself": ("scheduler", "scheduler"),
        "the index": ("model_index.json", outside / "there/scheduler_config.json"),
    }[kind]
    if kind == "over two links":
        (folder / "b.json").symlink_to(outside / "there/scheduler_config.json")
    path = folder / link
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path


LINKS = ("a file", "a config", "a folder", "over two links", "hidden", "another kind", "nothing", "itself", "the index")


@pytest.mark.parametrize("kind", LINKS)
def test_links_do_not_fetch_from_elsewhere(kind, home, tmp_path, capsys):
    """Neither into a release nor into a merged folder; the link is named and nothing is written."""
    folder = Path(shutil.copytree(home / "base", tmp_path / "base"))
    link = leading_out(kind, folder, tmp_path / "outside")
    assert export(folder, tmp_path / "out") == 1
    assert f"'{link}'" in capsys.readouterr().err
    assert merge(home, tmp_path / "merged", folder) == 1
    assert f"'{link}'" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"base", "outside"}


def test_a_training_says_before_that_its_model_cannot_be_saved(home, tmp_path, capsys):
    """Not only at its end; an adapter can be trained."""
    folder = Path(shutil.copytree(home / "base", tmp_path / "base"))
    link = leading_out("a config", folder, tmp_path / "outside")
    chosen = [f"run.out={tmp_path}/run", f"model.path={folder}", f"data.cache={tmp_path}/cache", "train.steps=1"]
    assert main([str(home / "r.toml"), *(part for c in chosen for part in ("--set", c))]) == 0
    assert f"no model folder can be written with this base: '{link}'" in capsys.readouterr().err


def test_links_inside_and_in_the_hubs_cache_are_followed(home, tmp_path):
    """A snapshot of the hub is made of links to the blobs beside it, a folder of one's own may share files."""
    own = Path(shutil.copytree(home / "base", tmp_path / "own"))
    (own / "scheduler").rename(own / "euler")
    (own / "scheduler").symlink_to("euler")
    cache = tmp_path / "models--someone--thing"
    snapshot = cache / "snapshots" / ("a" * 40)
    shutil.copytree(home / "base", snapshot)
    (cache / "blobs").mkdir()
    for i, file in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        file.rename(cache / f"blobs/{i:040x}")
        file.symlink_to(os.path.relpath(cache / f"blobs/{i:040x}", file.parent))
    assert merge(home, tmp_path / "merged", snapshot) == 0
    wanted = files_in(home / "base") | {"README.md"}
    for source, more in ((own, set()), (snapshot, set()), (tmp_path / "merged", {"merge.json", "dedistill.json"})):
        out = tmp_path / f"out-{source.name}"
        assert export(source, out) == 0
        assert files_in(out) == wanted | more and not any(p.is_symlink() for p in out.rglob("*"))
        weights = "text_encoder/model.safetensors"
        assert (out / weights).read_bytes() == (home / "base" / weights).read_bytes()
        FluxPipeline.from_pretrained(out, local_files_only=True)
