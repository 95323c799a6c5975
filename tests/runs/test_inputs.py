"""A run belongs to its recipe and to the bytes of its base and data, from its first step on and not before."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save, save_file

from dedistill.errors import UserError
from dedistill.io import hashing
from dedistill.io.atomic import checksummed, read_checksummed
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.runs.model import exported_step, last_weights
from dedistill.train import main


@pytest.fixture
def own_base(adapter_recipe, base_model, tmp_path):
    """The adapter recipe on a copy of the base that a test may change."""
    base = tmp_path / "base"
    shutil.copytree(base_model, base)
    adapter_recipe.write_text(adapter_recipe.read_text().replace(str(base_model), str(base)))
    return base


def nudge(folder) -> str:
    file = next(folder.rglob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    return str(file)


def test_another_base_is_refused_by_name(adapter_recipe, own_base, capsys):
    assert main([str(adapter_recipe)]) == 0
    file = nudge(own_base)
    capsys.readouterr()
    assert main([str(adapter_recipe), "--set", "train.steps=8"]) == 1
    err = capsys.readouterr().err
    assert "model.path: 1 file differs from those that the run in" in err and file in err and "dedistill.toml:" in err


def test_the_base_is_read_once_per_run_and_again_only_when_touched(adapter_recipe, own_base, tmp_path, files_read):
    def read() -> list[str]:
        """Files of the base that were read; what comes then is a process that knows only what the run recorded."""
        found = sorted(file.name for file in files_read.elements() if file.is_relative_to(own_base))
        files_read.clear()
        hashing._known.clear()
        return found

    assert main([str(adapter_recipe)]) == 0
    assert read() == ["config.json", "dedistill.json", "diffusion_pytorch_model.safetensors"]
    assert main([str(adapter_recipe)]) == 0 and read() == []
    os.utime(next(own_base.rglob("*.safetensors")), (1, 1))
    assert main([str(adapter_recipe)]) == 0, "the same bytes at another time are the same base"
    assert read() == ["diffusion_pytorch_model.safetensors"]
    recorded = read_checksummed(tmp_path / "dedistill" / "inputs.json")
    assert recorded.keys() == {"model.path", "base.sample"} and len(recorded["model.path"]["files"]) == 3


def longer(recipe) -> list[str]:
    return [str(recipe), "--set", "train.steps=8"]


def swap_number(base, at: int) -> Path:
    """Change the number ``at`` a place of the largest tensor of a base whose file keeps its size and mtime."""
    file = next(base.rglob("*.safetensors"))
    status, tensors = file.stat(), load_file(file)
    largest = max(tensors.values(), key=lambda t: t.numel())
    largest.view(-1)[at] += 1
    data = save(tensors, metadata={"format": "pt"})
    assert len(data) == status.st_size
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return file


def as_ours(base) -> None:
    """The weights' file as ``swap_number`` would write it."""
    file = next(base.rglob("*.safetensors"))
    save_file(load_file(file), file, metadata={"format": "pt"})


@pytest.mark.parametrize("at", [0, -1])
def test_a_base_of_the_same_size_and_time_is_refused(adapter_recipe, own_base, capsys, at):
    """Whether or not the few numbers that every start looks at are among those that differ."""
    as_ours(own_base)
    assert main([str(adapter_recipe)]) == 0
    file = swap_number(own_base, at)
    capsys.readouterr()
    assert main(longer(adapter_recipe)) == 1
    assert "model.path: 1 file differs" in (err := capsys.readouterr().err) and str(file) in err


def test_a_base_whose_whole_stamp_was_kept_is_refused(adapter_recipe, own_base, tmp_path, capsys):
    """Where a file system makes up ctime and inode, the numbers that were loaded give it away."""
    as_ours(own_base)
    assert main([str(adapter_recipe)]) == 0
    file = swap_number(own_base, 0)
    record = tmp_path / "dedistill" / "inputs.json"
    told = read_checksummed(record)
    told["model.path"]["files"][file.relative_to(own_base).as_posix()] |= hashing.Stamp.of(file.stat())._asdict()
    record.write_bytes(checksummed(told))
    capsys.readouterr()
    assert main(longer(adapter_recipe)) == 1
    assert "model.path: 1 file differs" in (err := capsys.readouterr().err) and str(file) in err


def test_the_same_base_on_another_disk_goes_on(adapter_recipe, own_base, tmp_path, capsys):
    """Copied there and back: other inodes, ctimes and mtimes, the same bytes; and loaded by a device that rounds otherwise."""
    assert main([str(adapter_recipe)]) == 0
    shutil.copytree(own_base, tmp_path / "moved")
    shutil.rmtree(own_base)
    shutil.copytree(tmp_path / "moved", own_base, copy_function=shutil.copyfile)
    record = tmp_path / "dedistill" / "inputs.json"
    told = read_checksummed(record)
    told["base.sample"]["sha256"] = "0" * 64
    record.write_bytes(checksummed(told))
    capsys.readouterr()
    assert main(longer(adapter_recipe)) == 0
    err = capsys.readouterr().err
    assert "continued from step 6" in err and "the base's numbers, as loaded, are not those" in err
    assert main([str(adapter_recipe), "--set", "train.steps=10"]) == 0
    assert "the base's numbers" not in capsys.readouterr().err


def test_a_run_of_an_earlier_version_goes_on_and_is_bound_anew(adapter_recipe, own_base, tmp_path):
    """It recorded size and mtime only."""
    assert main([str(adapter_recipe)]) == 0
    record = tmp_path / "dedistill" / "inputs.json"
    whole = read_checksummed(record)
    files = whole["model.path"]["files"]
    kept = {path: {key: entry[key] for key in ("bytes", "mtime_ns", "sha256")} for path, entry in files.items()}
    record.write_bytes(checksummed({"model.path": whole["model.path"] | {"files": kept}}))
    assert main(longer(adapter_recipe)) == 0
    now = read_checksummed(record)
    assert {key: value["sha256"] for key, value in now.items()} == {key: value["sha256"] for key, value in whole.items()}
    assert all("ctime_ns" in entry for entry in now["model.path"]["files"].values())


def test_other_pairs_are_refused(teacher_recipe, tmp_path, capsys):
    from dedistill.data.encode import open_source
    from dedistill.recipe import load_recipe
    from dedistill.runs.model import open_finished
    from dedistill.sampling.pairs import make_pairs
    from dedistill.sampling.sampler import Sampling

    assert main([str(teacher_recipe)]) == 0
    recipe, folder = load_recipe(teacher_recipe), tmp_path / "pairs"
    settings = {"teacher": "x", "count": 16, "sampling": Sampling(steps=2), "points": 2, "shard_size": 16}
    make_pairs(open_finished(recipe), open_source(recipe.data), folder, **settings, seed=0)
    values = ["data.source=pairs", f"data.path={folder}", "data.caption_noise=0.0", "train.objective=distill"]
    student = [str(teacher_recipe), *(a for v in [f"run.out={tmp_path / 's'}", *values] for a in ("--set", v))]
    assert main(student) == 0
    shutil.rmtree(folder)
    make_pairs(open_finished(recipe), open_source(recipe.data), folder, **settings, seed=1)
    capsys.readouterr()
    assert main(student) == 1
    err = capsys.readouterr().err
    assert "data.path: 1 file differs" in err and str(folder / "pairs.json") in err


def test_a_start_that_failed_binds_nothing(adapter_recipe, base_model, tmp_path, capsys):
    """A wrong path is corrected in the same run directory; results bind it."""
    text, wrong = adapter_recipe.read_text(), tmp_path / "no model"
    wrong.mkdir()
    adapter_recipe.write_text(text.replace(str(base_model), str(wrong)))
    assert main([str(adapter_recipe)]) == 1
    assert not (tmp_path / "dedistill").exists()
    adapter_recipe.write_text(text)
    assert main([str(adapter_recipe)]) == 0
    adapter_recipe.write_text(text.replace(str(base_model), str(wrong)))
    capsys.readouterr()
    assert main([str(adapter_recipe)]) == 1
    assert "holds a run of another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "left", ["metrics.jsonl", "snapshots/step-00000002.safetensors", "model/x", "checkpoints/step-1.bad/x"]
)
def test_results_without_a_recipe_are_left_alone(adapter_recipe, tmp_path, capsys, left):
    file = tmp_path / "dedistill" / left
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert main([str(adapter_recipe)]) == 1
    assert "holds results but no recipe.json" in capsys.readouterr().err and file.read_text() == "mine"


def test_micro_batch_and_checkpointing_may_change_on_the_way(adapter_recipe, capsys):
    assert main([str(adapter_recipe)]) == 0
    longer = ["train.steps=8", "train.micro_batch=4", "train.gradient_checkpointing=true"]
    assert main([str(adapter_recipe), *(a for s in longer for a in ("--set", s))]) == 0
    assert "continued from step 6" in capsys.readouterr().err


def test_an_older_export_is_replaced(teacher_recipe, tmp_path):
    """A run made longer, killed after its last checkpoint, exports at the next start although a model is there."""
    longer = [str(teacher_recipe), "--set", "train.steps=6"]
    model, old = tmp_path / "teacher" / "model", tmp_path / "old"
    assert main([str(teacher_recipe)]) == 0 and exported_step(model) == 4
    shutil.copytree(model, old)
    assert main(longer) == 0 and exported_step(model) == 6
    weights = "transformer/diffusion_pytorch_model.safetensors"
    newest = (model / weights).read_bytes()
    shutil.rmtree(model)
    shutil.copytree(old, model)  # as a kill between checkpoint and export leaves it
    assert main(longer) == 0 and exported_step(model) == 6 and (model / weights).read_bytes() == newest


def test_a_full_disk_at_the_export_is_named(teacher_recipe, tmp_path, capsys, small_disk):
    """Safetensors reports it as no OSError; the older folder and the checkpoint stay."""
    assert main([str(teacher_recipe)]) == 0
    model = tmp_path / "teacher" / "model"
    (model / "run.json").unlink()
    capsys.readouterr()
    with small_disk(20_000):
        assert main([str(teacher_recipe)]) == 1
    err = capsys.readouterr().err
    assert f"cannot write the model folder '{model}'" in err and "too large" in err and "checkpoint of step 4 is intact" in err
    assert list(tmp_path.rglob("*.tmp-*")) == [] and (model / "transformer" / "config.json").exists()
    assert main([str(teacher_recipe)]) == 0 and exported_step(model) == 4


def test_last_weights_are_never_damaged_ones(adapter_recipe, tmp_path):
    out = tmp_path / "dedistill"
    assert main([str(adapter_recipe), "--set", "snapshot.every=0"]) == 0
    older, newest = list_checkpoints(out / "checkpoints")
    assert last_weights(out) == newest / "trainable.safetensors"
    (newest / "optimizer.safetensors").write_bytes(b"rot")
    assert last_weights(out) == older / "trainable.safetensors"
    (older / "manifest.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"no good checkpoint(.|\n)*step-00000006' is damaged: optimizer\.safetensors has 3 bytes"
    ):
        last_weights(out)
