"""Which files of a folder are its weights, and what is said of those that are none."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dedistill.errors import UserError
from dedistill.io.weights import open_weights, weight_files

PLAIN = "diffusion_pytorch_model.safetensors"
SHARDS = [f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def fill(folder, *names, index=(), stem="diffusion_pytorch_model"):
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.ones(1)}, folder / name)
    if index:
        where = {f"t{i}": name for i, name in enumerate(index)}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize(
    ("names", "index"), [([PLAIN], ()), (SHARDS, SHARDS), (SHARDS, ()), (["model.fp16.safetensors"], ()), ([PLAIN], [PLAIN])]
)
def test_what_counts(tmp_path, names, index):
    fill(tmp_path, *names, index=index)
    assert [file.name for file in weight_files(tmp_path)] == sorted(names)


@pytest.mark.parametrize(
    ("names", "index", "said"),
    [
        ([PLAIN, *SHARDS], SHARDS, PLAIN),
        ([*SHARDS, "diffusion_pytorch_model-00001-of-00002.safetensors"], SHARDS, "00001-of-00002"),
        ([*SHARDS, "diffusion_pytorch_model.bf16-00001-of-00003.safetensors"], SHARDS, "bf16-00001-of-00003"),
        (
            [PLAIN, "diffusion_pytorch_model.non_ema.safetensors"],
            (),
            "lie beside diffusion_pytorch_model.safe.*non_ema",
        ),
        (["a.safetensors", "b.safetensors"], (), "lie beside a.safetensors: b.safetensors"),
        (SHARDS[:2], (), "lacks 'diffusion_pytorch_model-00003-of-00003.safetensors', one of its 3 shards"),
        (SHARDS[1:], SHARDS, "lacks 'diffusion_pytorch_model-00001-of-00003.safetensors', which"),
    ],
)
def test_mixtures_and_parts_are_refused_by_name(tmp_path, names, index, said):
    fill(tmp_path, *names, index=index)
    with pytest.raises(UserError, match=rf"^model\.path: .*{said}"):
        weight_files(tmp_path, "model.path")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": ["x"]}'])
def test_an_index_that_names_nothing(tmp_path, content):
    fill(tmp_path, PLAIN)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


def test_two_indices(tmp_path):
    fill(tmp_path, PLAIN, index=[PLAIN])
    fill(tmp_path, index=[PLAIN], stem="diffusion_pytorch_model.fp16")
    with pytest.raises(UserError, match="has 2 indices"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of Git LFS"),
        (b"GGUF\x03\0\0\0" + bytes(50), "a GGUF file"),
        (b"\x80\x02}q\0.", "a pickle"),
        (b"PK\x03\x04" + bytes(50), "a pickle or a zip"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "it is empty"),
    ],
)
def test_files_of_other_kinds_are_named_as_what_they_are(tmp_path, content, said):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"^here: '{tmp_path}/x.safetensors' cannot be read as safetensors: .*{said}"):
        open_weights(tmp_path / "x.safetensors", "here")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.ckpt", "flux.gguf"])
def test_a_folder_of_other_kinds_alone_is_refused_by_what_they_are(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF" if name.endswith("gguf") else b"PK\x03\x04")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"^here: '{tmp_path}/{name}' cannot be .*(pickle|GGUF)"):
        weight_files(tmp_path, "here")
    fill(tmp_path, PLAIN)
    assert [file.name for file in weight_files(tmp_path, "here")] == [PLAIN], "beside safetensors they do not count"
