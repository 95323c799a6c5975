"""A release holds the model and nothing else: no credentials, code or pickles, and no place on this machine."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from by_file import tool
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_recipes import IMAGES

from dedistill.models.pipeline_files import public_config
from dedistill.models.registry import public_name
from dedistill.recipe.fields import Table
from dedistill.recipe.schema import Recipe
from dedistill.recipe.toml import fields_of, table_in
from dedistill.release.headers import public_recipe
from dedistill.train import main

TOOLS = Path(__file__).parents[2] / "tools"
TOKEN = "hf_markMARKmark"
PLACE = "jane-acme"
"""Part of every path of the run below: a user and a client."""


@pytest.fixture(scope="module")
def home(tmp_path_factory, photos) -> Path:
    """``base``, a pipeline folder as diffusers saves one again, and a run on it with two snapshots, all below PLACE."""
    from dedistill.models.flux.tiny import write_tiny_flux

    folder = tmp_path_factory.mktemp("home") / PLACE
    write_tiny_flux(folder / "first")
    FluxPipeline.from_pretrained(folder / "first", local_files_only=True).save_pretrained(folder / "base")
    assert PLACE in (folder / "base/vae/config.json").read_text(), "or there is nothing to hide"
    images = shutil.copytree(photos, folder / "unreleased-product")
    recipe = IMAGES.format(out=folder, base=folder / "base", images=images, cache=folder / "cache")
    (folder / "r.toml").write_text(recipe.replace("[train]", 'name = "product"\n[train]') + "[snapshot]\nevery = 1\n")
    assert main([str(folder / "r.toml"), "--debug"]) == 0
    save_file(load_file(folder / "run/snapshots/step-00000002.safetensors"), folder / "tensors.safetensors")
    return folder


def export(source: Path, out: Path, format: str = "diffusers", *more: object) -> int:
    return tool("export_model", source, "--format", format, "--out", out, *more)


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
    *("tokenizer/notes.txt", "scheduler/credentials.json", "text_encoder/trainer_state.json", "text_encoder_2/secret.model"),
    *("vae/config (copy).json", "scheduler/wandb_config.json"),
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
    assert not telling(tmp_path / "out", TOKEN, PLACE), "configs name the folder that they were read from"
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
    assert str(private) in said and "not a pipeline folder" in said and not list(tmp_path.glob("out*"))


def leading_out(kind: str, folder: Path, outside: Path) -> Path:
    """Put a link of some kind into model folder ``folder``; returns it."""
    (outside / "there").mkdir(parents=True)
    (outside / "there/scheduler_config.json").write_text(json.dumps({"shift": 1.0, "password": TOKEN}))
    (folder / ".git").mkdir()
    (folder / ".git/config.json").write_text(json.dumps({"password": TOKEN}))
    (folder / "old.ckpt").write_text(TOKEN)
    link, target = {
        "a file": ("scheduler/config.json", outside / "there/scheduler_config.json"),
        "a config": ("scheduler/scheduler_config.json", outside / "there/scheduler_config.json"),
        "a folder": ("scheduler", outside / "there"),
        "over two links": ("scheduler/config.json", folder / "b.json"),
        "hidden": ("scheduler/config.json", "../.git/config.json"),
        "another kind": ("scheduler/config.json", "../old.ckpt"),
        "nothing": ("scheduler/config.json", "gone.json"),
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
    told = json.loads((tmp_path / "out-merged/dedistill.json").read_text())
    assert told["base"]["path"] == "someone/thing"


def said_in(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as f:
        return f.metadata()


@pytest.fixture(scope="module")
def merged(home) -> Path:
    assert merge(home, home / "merged") == 0
    return home / "merged"


@pytest.mark.parametrize("format", ["diffusers", "int8", "single", "bfl"])
def test_a_released_model_names_no_place(format, home, merged, tmp_path):
    """Not in dedistill.json, configs, headers and card; how it was trained is told."""
    assert export(merged, tmp_path / "x", format) == 0
    assert telling(tmp_path / "x", PLACE, "unreleased-product", '"product', str(home)) == []
    if format in ("diffusers", "int8"):
        facts = json.loads((tmp_path / "x/dedistill.json").read_text())
    else:
        header = said_in(tmp_path / "x/x.safetensors")
        facts = json.loads(header["dedistill.facts"])
        assert header["modelspec.merged_from"] == "base" and "lr = 0.01" in header["dedistill.recipe"]
    (step,) = facts["merges"]
    assert facts["base"]["path"] == "base" and step["adapter"] == "step-00000002.safetensors"
    assert "lr = 0.01" in step["recipe"] and 'path = "base"' in step["recipe"]
    assert "`base`" in (tmp_path / "x/README.md").read_text()


@pytest.mark.parametrize("format", ["peft", "kohya", "lycoris"])
def test_a_released_adapter_names_no_place(format, home, tmp_path):
    source = home / "run/snapshots/step-00000002.safetensors"
    assert PLACE in said_in(source)["dedistill.recipe"], "a run is continued by it"
    out = tmp_path / "adapter.safetensors"
    assert export(source, out, format, "--model", home / "base") == 0
    assert telling(tmp_path, PLACE, "unreleased-product", '"product') == []
    assert said_in(out)["ss_learning_rate"] == "0.01" and said_in(out)["dedistill.step"] == "2"


def test_a_released_whole_training_names_no_place(home, tmp_path):
    """``trained`` in dedistill.json holds a recipe too."""
    text = (
        (home / "r.toml")
        .read_text()
        .replace('[adapter]\nkind = "lora"\n[[adapter.targets]]\npreset = "attention"\nrank = 2\n', "")
    )
    (home / "full.toml").write_text(text.replace("/run", "/full"))
    assert main([str(home / "full.toml"), "--debug"]) == 0
    assert export(home / "full/model", tmp_path / "out") == 0
    assert telling(tmp_path / "out", PLACE, "unreleased-product") == []
    (step,) = json.loads((tmp_path / "out/dedistill.json").read_text())["trained"]
    assert step["step"] == 2 and "lr = 0.01" in step["recipe"]


def test_provenance_of_others_is_not_passed_on(home, tmp_path):
    """Kohya's headers list folders of images; a dedistill.json from elsewhere, or a link to another file, may hold anything."""
    folder = Path(shutil.copytree(home / "base", tmp_path / "base"))
    step = {"adapter_header": {"ss_dataset_dirs": TOKEN, "dedistill.step": "3"}, "recipe": "", "adapter": f"/{TOKEN}/a"}
    step |= {"dtype": "bf16", "rounding": "nearest", "lost": 0.0}
    facts = {"family": "flux", "auths": {"x": TOKEN}, "merges": [step], "base": {"path": f"/{TOKEN}/thing"}}
    (folder / "dedistill.json").write_text(json.dumps(facts))
    for format in ("diffusers", "single"):
        assert export(folder, tmp_path / format, format) == 0
        assert telling(tmp_path / format, TOKEN) == []


def test_a_released_adapter_still_knows_its_base(home, tmp_path, capsys):
    """By its name: the same base elsewhere is right, another one is refused, and so is a path for the card."""
    out = tmp_path / "adapter.safetensors"
    assert export(home / "run/snapshots/step-00000002.safetensors", out, "peft", "--model", home / "base") == 0
    for place in ("elsewhere/base", "other"):
        shutil.copytree(home / "base", tmp_path / place)
    assert merge(home, tmp_path / "one", weights=out) == 0
    assert merge(home, tmp_path / "two", tmp_path / "elsewhere/base", out) == 0
    capsys.readouterr()
    assert merge(home, tmp_path / "three", tmp_path / "other", out) == 1
    said = capsys.readouterr().err
    assert "was trained on 'base'" in said and "give its folder the name 'base'" in said and not (tmp_path / "three").exists()
    assert export(home / "base", tmp_path / "four", "single", "--base", home / "base") == 2
    assert not (tmp_path / "four").exists() and "not a hub id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "revision", "name"),
    [
        ("/home/jane/models/FLUX.1-schnell", None, "black-forest-labs/FLUX.1-schnell"),
        ("black-forest-labs/FLUX.1-dev", None, "black-forest-labs/FLUX.1-dev"),
        ("someone/FLUX.1-dev-tuned", "a" * 40, "someone/FLUX.1-dev-tuned"),
        ("acme/model", None, "model"),
        ("/home/jane/acme/mine.safetensors", None, "mine.safetensors"),
        ("/c/hub/models--someone--some-thing/snapshots/abc", None, "someone/some-thing"),
        ("tests/release", "a" * 40, "release"),
        ("", None, ""),
    ],
)
def test_names_of_bases(path, revision, name, monkeypatch):
    """The hub id where it is known, else the last name."""
    monkeypatch.chdir(TOOLS.parent)
    assert public_name(path, revision) == name


def takes_text(kind: Any) -> bool:
    return kind is str or any(map(takes_text, get_args(kind)))


def texts(model: type[Table], path: tuple[str, ...] = ()) -> set[str]:
    """Dotted keys of a recipe that may hold any text."""
    found = set()
    for name, field in fields_of(model).items():
        if inner := table_in(field.annotation):
            found |= texts(inner, (*path, name))
        elif takes_text(field.annotation):
            found.add(".".join((*path, name)))
    return found


def test_every_text_of_a_recipe_is_known_to_be_a_place_or_not():
    """A new key for a folder has to be hidden in released recipes, or this list says that it is none."""
    hidden = {
        "run.out",
        "model.path",
        "model.components",
        "data.path",
        "data.pairs",
        "data.cache",
        "data.sets.path",
        "data.sets.name",
        "train.lpips",
    }
    hidden |= {"model.image_prompts", "preview.prompts", "sample.negative"}  # of prompts the images that they name
    harmless = {"run.name", "model.family", "model.revision", "adapter.targets.pattern", "adapter.targets.preset"}
    harmless |= {
        "base.exclude",
        "data.sets.captions",
        "data.sets.file_column",
        "data.sets.split",
        "sample.guider",
    }
    assert texts(Recipe) == hidden | harmless
    model = 'path = "/p/m"\ncomponents = "/p/c"\nimage_prompts = "/p/i"\n'
    prompts = '[sample]\nnegative = "n <image:/p/n>"\n[preview]\nprompts = ["a <image:/p/x weight=0.5> b"]\n'
    trained = '[train]\nlpips = "/p/l"\n'
    places = f'[run]\nout = "/p/q"\n[model]\n{model}{prompts}{trained}[data]\npath = "/p/q"\npairs = "x/p/q"\ncache = "/p/q"\n'
    told = public_recipe(places + '[[data.sets]]\nname = "p"\npath = "/p/q"\nweight = 2.0\n')
    assert '["a b"]' in told and '"n"' in told and 'image_prompts = "i"' in told
    assert "/p" not in told and '"p"' not in told and "weight = 2.0" in told and 'components = "c"' in told


def test_weights_that_no_loader_takes_stay(home, tmp_path, capsys):
    """Variants, averages, an optimizer's state and shards of an earlier download, also beside an index."""
    folder = Path(shutil.copytree(home / "base", tmp_path / "base"))
    names = [
        "vae/optimizer",
        "vae/diffusion_pytorch_model.ema",
        "text_encoder/model.fp16",
        "text_encoder_2/model-00001-of-00009",
    ]
    for name in names:
        save_file({"x": torch.zeros(9)}, folder / f"{name}.safetensors")
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(
        folder / "vae/diffusion_pytorch_model-00001-of-00001.safetensors"
    )
    (folder / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "diffusion_pytorch_model-00001-of-00001.safetensors"}})
    )
    assert export(folder, tmp_path / "out") == 0
    assert "left out" in capsys.readouterr().err
    assert files_in(folder) - files_in(tmp_path / "out") == {f"{name}.safetensors" for name in names}


def test_weights_of_another_name_alone_are_not_lost_in_silence(home, tmp_path, capsys):
    """Loaders read such a variant only where it is asked for."""
    shutil.copytree(home / "base", tmp_path / "base")
    weights = tmp_path / "base/vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert export(tmp_path / "base", tmp_path / "out") == 1
    assert "no weights but 'diffusion_pytorch_model.fp16.safetensors'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_headers_of_components_tell_of_their_tensors_alone(part, home, tmp_path):
    folder = Path(shutil.copytree(home / "base", tmp_path / "base"))
    file = f"{part}.safetensors"
    tensors = load_file(folder / file)
    (folder / file).unlink()
    save_file(tensors, folder / file, metadata={"format": "pt", "ss_dataset_dirs": f"/home/{PLACE}", "token": TOKEN})
    assert export(folder, tmp_path / "out") == 0
    assert telling(tmp_path / "out", PLACE, TOKEN) == [] and said_in(tmp_path / "out" / file) == {"format": "pt"}
    copied = load_file(tmp_path / "out" / file)
    assert copied.keys() == tensors.keys() and all(torch.equal(copied[name], tensors[name]) for name in tensors)


RECIPES = {
    "a comment": f'# of /home/{PLACE}\n[run]\nname = "a"\n',
    "a key of another version": f'[run]\nname = "a"\nlog_dir = "{PLACE}"\n',
    "a table of another version": f'[train]\nsteps = 1\n[tracker]\nuser = "{PLACE}"\n',
    "a key of a set": f'[[data.sets]]\nweight = 2.0\nclient = "{PLACE}"\n',
    "a path of another system": f"[model]\npath = 'C:\\Users\\{PLACE}\\m'\n",
    "a home folder": f"[model]\npath = '/home/{PLACE}/'\n",
    "a name that is a path": f'[run]\nname = "~/{PLACE}/x"\n',
    "an address": f'[sample]\nguider = "s3://{PLACE}/x"\n',
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes_tell_of_what_this_version_knows(kind):
    told = public_recipe(RECIPES[kind])
    assert PLACE not in told.removesuffix(f'"{PLACE}\\m"') and public_recipe(told) == told


def test_what_a_model_folder_says_is_told_by_our_own_keys(home, tmp_path):
    folder = Path(shutil.copytree(home / "base", tmp_path / "base"))
    step = {"recipe": "", "adapter": f"C:\\{PLACE}\\a.safetensors", "host": PLACE, "dtype": "bf16", "rounding": "nearest"}
    step["adapter_header"] = {"dedistill.step": "3", "dedistill.place": PLACE, "dedistill.run": f"/home/{PLACE}"}
    base = {"path": f"C:\\{PLACE}\\thing", "revision": f"/home/{PLACE}", "owner": PLACE}
    facts = {"family": "flux", "merges": [step], "base": base, "shift": f"//server/{PLACE}", "text": {"a": [f"~/{PLACE}"]}}
    (folder / "dedistill.json").write_text(json.dumps(facts))
    for format in ("diffusers", "single"):
        assert export(folder, tmp_path / format, format) == 0
        assert telling(tmp_path / format, PLACE) == []
    told = json.loads((tmp_path / "diffusers/dedistill.json").read_text())
    assert told["base"] == {"path": "thing"} and told["merges"][0]["adapter"] == "a.safetensors"
    assert told["merges"][0]["adapter_header"] == {"dedistill.step": "3"}


def test_an_adapter_s_header_is_told_by_our_own_keys(home, tmp_path):
    source = home / "run/snapshots/step-00000002.safetensors"
    header = {k: v for k, v in said_in(source).items() if k != "dedistill.sha256"}
    header |= {"dedistill.host": PLACE, "dedistill.step": f"/home/{PLACE}", "modelspec.author": PLACE}
    header["dedistill.recipe"] = f"# /home/{PLACE}\n{header['dedistill.recipe']}\n[paths]\nlog = '{PLACE}'\n"
    save_file(load_file(source), tmp_path / "a.safetensors", metadata=header)
    (tmp_path / "out").mkdir()
    assert export(tmp_path / "a.safetensors", tmp_path / "out/b.safetensors", "peft", "--model", home / "base") == 0
    assert telling(tmp_path / "out", PLACE) == []


def test_a_recipe_in_a_header_that_is_none_is_said(home, tmp_path, capsys):
    save_file({"x.alpha": torch.ones(())}, tmp_path / "a.safetensors", metadata={"dedistill.recipe": "=="})
    assert export(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "peft") == 1
    assert "a.safetensors' cannot be read: Invalid statement" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "public"),
    [
        ({"text_config": {"_name_or_path": "/home/me/clip", "width": 8}}, {"text_config": {"width": 8}}),
        ({"source": "file:///me/x", "a": "./x", "b": "..\\x", "c": "https://x/y"}, {"c": "https://x/y"}),
        ({"parts": [{"file": "~/x"}, {"file": "a/b"}], "a": ["C:\\me", 1]}, {"parts": [{}, {"file": "a/b"}], "a": [1]}),
    ],
)
def test_places_deep_in_a_config_are_left_out(config, public):
    assert public_config(config) == public
