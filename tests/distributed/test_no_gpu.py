"""What was meant for GPUs and would be done by the CPU: refused, unless that was chosen; small networks go there unasked."""

import json
from pathlib import Path

import pytest
import torch

from dedistill.cli.main import main
from dedistill.distributed.launcher import require_gpu
from dedistill.errors import UserError
from dedistill.io.weights import count_numbers

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def unasked(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)


def write_large(file: Path, numbers: int = 1_200_000_000) -> Path:
    """A sparse safetensors file: only its header takes room."""
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [numbers // 2, 2], "data_offsets": [0, numbers]}}).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + numbers)
    return file


@pytest.mark.parametrize("command", ["train", "prepare", "influence"])
@pytest.mark.parametrize("base", ["hub id", "folder", "file"])
def test_a_large_network_needs_a_word(command, base, photos, tmp_path, capsys):
    """Whether it is here or yet to be fetched; and nothing has been fetched, encoded or written."""
    write_large(tmp_path / "here/transformer/x.safetensors")
    path = {"hub id": [], "folder": ["model.path=here"], "file": ["model.path=here/transformer/x.safetensors"]}[base]
    settings = [f"data.sets.0.path='{photos}'", "model.components=here", *path][: None if path else 1]
    words = [word for setting in settings for word in ("--set", setting)]
    if command == "influence":
        (tmp_path / "here/prompts").write_text("a fox\n")
        words += ["--prompts", "here/prompts"]
    assert main([command, "dedistill:flux_schnell", *words]) == 2
    said = capsys.readouterr().err
    size = "1.2 billion" if path else "11.9 billion"
    assert f"error: the network has {size} parameters, but torch {torch.__version__} finds no GPU" in said and "--cpu" in said
    assert {p.name for p in tmp_path.rglob("*")} - {"prompts", "runs", "flux_schnell", "influence", ".dedistill"} == {
        "here",
        "transformer",
        "x.safetensors",
    }


@pytest.mark.parametrize("chosen", ["--cpu", "", "-1,-1", "accelerate"])
def test_the_cpu_can_be_chosen(chosen, photos, tmp_path, monkeypatch, capsys):
    file = write_large(tmp_path / "x.safetensors")
    if chosen == "accelerate":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if chosen == "--cpu" else chosen)
    words = ["--set", f"data.sets.0.path='{photos}'", "--set", f"model.path='{file}'", "--set", "model.components=."]
    assert main(["train", "dedistill:flux_schnell", *words, *(["--cpu"] if chosen == "--cpu" else [])]) != 0
    said = capsys.readouterr().err
    assert "finds no GPU" not in said and "is not a FLUX denoiser" in said, "it went on, and looked into the file"


@pytest.mark.parametrize("count", [2, 8])
def test_a_launcher_that_asks_for_gpus(count, adapter_recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setenv("RANK", "0")
    assert main(["train", str(adapter_recipe)]) == 2
    said = capsys.readouterr().err
    assert f"the launcher starts {count} processes for GPUs, but torch {torch.__version__} finds no GPU" in said
    assert "launch/cpu_2.yaml" in said


def test_small_ones_are_not_asked_about():
    require_gpu(lambda: 1_000_000_000)
    with pytest.raises(UserError, match=r"1\.0 billion"):
        require_gpu(lambda: 1_000_000_001)


def test_what_cannot_be_read_counts_nothing(tmp_path):
    """Whoever loads it says what is wrong."""
    (tmp_path / "x.safetensors").write_bytes(b"GGUF")
    assert count_numbers(tmp_path / "x.safetensors") == count_numbers(tmp_path / "none.safetensors") == 0
    assert count_numbers(write_large(tmp_path / "y.safetensors", 10)) == 10
