"""dedistill posthoc on a finished tiny run: both kinds, every space, and what it says when it cannot."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_recipes import ADAPTER

from dedistill.evaluation.candidates import candidates_of
from dedistill.recipe import load_recipe
from dedistill.runs.model import open_finished
from dedistill.train import main as train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base_model) -> Path:
    """Folder of a run of 8 steps with a snapshot after each second, on an unquantized base, both averages tracked."""
    folder = tmp_path_factory.mktemp("posthoc")
    recipe = folder / "dedistill.toml"
    recipe.write_text(ADAPTER.format(out=folder, base=base_model))
    settings = ["base.quant=none", "train.steps=8", "snapshot.ema=[0.05, 0.10]", "train.lr=1e-2", "validate.every=8"]
    assert train([str(recipe), "--debug", *(a for s in settings for a in ("--set", s))]) == 0
    return folder / "dedistill"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def tool(*arguments: object) -> int:
    before, sys.argv = sys.argv, ["posthoc_ema.py", *map(str, arguments), "--debug"]
    try:
        runpy.run_path(str(ROOT / "tools" / "posthoc_ema.py"), run_name="__main__")
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv = before
    return 0


def test_widths_from_the_tracked_averages(run, capsys):
    """A tracked width is its own last snapshot; one far outside is made, with a warning that says how far off."""
    assert tool(run, "--sigma-rel", "0.1", "0.075", "0.02") == 0
    said = capsys.readouterr().out
    assert "8 snapshots of the averages of sigma_rel 0.05 and 0.1, up to step 8" in said and "3 averages in" in said
    assert "warning: sigma_rel 0.02" in said and "warning: sigma_rel 0.1 " not in said
    assert sorted(p.name for p in (run / "posthoc").iterdir()) == [
        f"sigma_rel_{s}.safetensors" for s in ("0.02", "0.075", "0.1")
    ]
    found = load_file(run / "posthoc" / "sigma_rel_0.1.safetensors")
    tracked = load_file(run / "snapshots" / "ema_0.1" / "step-00000008.safetensors")
    for name, tensor in tracked.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def test_the_header_lists_every_input(run):
    """File of which average, hash and weight, which add up to 1; what it stands for; no warning is lost in it."""
    assert tool(run, "--sigma-rel", "0.075") == 0
    with safe_open(run / "posthoc" / "sigma_rel_0.075.safetensors", framework="pt") as f:
        header = f.metadata()
    inputs = json.loads(header["dedistill.ema_inputs"])
    assert header["dedistill.ema"] == "power sigma_rel=0.075 step=8 space=factors" and header["dedistill.step"] == "8"
    assert sorted(i["file"] for i in inputs) == [
        f"ema_{s}/step-{t:08d}.safetensors" for s in ("0.05", "0.1") for t in (2, 4, 6, 8)
    ]
    assert sum(i["weight"] for i in inputs) == pytest.approx(1) and all(len(i["sha256"]) == 64 for i in inputs)


def test_as_of_an_earlier_step(run, capsys):
    """Nothing later has a part in it."""
    assert tool(run, "--sigma-rel", "0.1", "--step", "4") == 0
    found = load_file(run / "posthoc" / "sigma_rel_0.1.safetensors")
    tracked = load_file(run / "snapshots" / "ema_0.1" / "step-00000004.safetensors")
    assert all(torch.allclose(found[n], t, rtol=1e-5, atol=1e-7) for n, t in tracked.items())
    assert tool(run, "--alpha", "1", "--step", "4") == 0
    last = load_file(run / "snapshots" / "step-00000004.safetensors")
    assert all(torch.equal(t, last[n]) for n, t in load_file(run / "posthoc" / "alpha_linear_1.safetensors").items())
    capsys.readouterr()


@pytest.mark.parametrize("space", ["factors", "refactored"])
def test_adapters_of_both_kinds_are_candidates_of_the_sweep(run, space, capsys):
    """They load into the recipe's network like any snapshot."""
    assert tool(run, "--alpha", "0.5", "--sigma-rel", "0.075", "--space", space) == 0
    said = capsys.readouterr().out
    assert ("refactoring lost" in said) == (space == "refactored")
    recipe = load_recipe(run / "recipe.toml", [f"run.out={run}"])
    found = candidates_of(recipe, ["posthoc"])
    end = "_refactored" if space == "refactored" else ""
    assert [c.name for c in found] == [f"alpha_linear_0.5{end}", f"sigma_rel_0.075{end}"]
    for candidate in found:
        assert candidate.open().adapter is not None


@pytest.mark.parametrize("kind", [("--alpha", "0.4"), ("--sigma-rel", "0.075")])
def test_merged_is_the_average_of_the_weights(run, kind, tmp_path, capsys):
    """Base + average of deltas, to bfloat16, is the average of what each snapshot merges to; the base stays."""
    assert tool(run, *kind, "--space", "merged", "--out", tmp_path / "merged") == 0
    (folder,) = (tmp_path / "merged").iterdir()
    assert tool(run, *kind, "--space", "delta") == 0
    (delta,) = (run / "posthoc_delta").iterdir()
    dense, inputs = load_file(delta), json.loads(_header(delta)["dedistill.ema_inputs"])
    merged = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    base = load_file(Path(load_recipe(run / "recipe.toml").model.path) / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = 0
    for name, tensor in base.items():
        change = dense.get("lycoris_" + name.removesuffix(".weight").replace(".", "_") + ".diff")
        total = tensor.float() if change is None else tensor.float() + change
        assert bool(((merged[name].float() - total).abs() <= total.abs() * 2**-7 + 1e-30).all()), name
        changed += change is not None
    assert changed == len(dense) > 0 and len(inputs) >= 4
    assert capsys.readouterr().err == ""


def test_an_interrupted_series_of_merged_averages_is_gone_on_with(run, tmp_path, capsys):
    """Folders that are there are kept as they are; one of other weights is refused, as any folder is."""
    out, command = tmp_path / "merged", ("--alpha", "0.3", "0.8", "--space", "merged", "--out", tmp_path / "merged")
    assert tool(run, *command) == 0
    whole = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    kept = (out / "alpha_linear_0.3" / "dedistill.json").stat()
    shutil.rmtree(out / "alpha_linear_0.8")
    assert tool(run, *command) == 0
    assert {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} == whole
    assert (out / "alpha_linear_0.3" / "dedistill.json").stat() == kept, "not made again"
    assert tool(run, *command, "--step", "4") == 1
    assert "already exists" in capsys.readouterr().err and (out / "alpha_linear_0.3" / "dedistill.json").stat() == kept


def test_a_delta_is_merged_by_the_other_tool_and_by_no_other(run, tmp_path):
    """A dense average is no adapter: only merging takes it."""
    from dedistill.errors import UserError
    from dedistill.release.export import export_adapter
    from dedistill.release.merge import merge_adapter

    assert tool(run, "--alpha", "0.4", "--space", "delta") == 0
    (delta,) = (run / "posthoc_delta").iterdir()
    recipe = load_recipe(run / "recipe.toml", [f"run.out={run}"])
    assert merge_adapter(recipe, delta, tmp_path / "merged").total.wanted > 0
    with pytest.raises(UserError, match=r"alpha_linear_0\.4\.safetensors"):
        open_finished(recipe, delta)
    with pytest.raises(UserError, match="of a kind that is not supported"):
        export_adapter(delta, tmp_path / "x.safetensors", "lycoris", Path(recipe.model.path))


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as f:
        return f.metadata()


def test_a_gap_can_be_skipped(run, capsys):
    (run / "snapshots" / "step-00000004.safetensors").unlink()
    assert tool(run) == 1
    assert "step-00000004.safetensors' is missing" in capsys.readouterr().err
    assert tool(run, "--alpha", "0.5", "--skip", "4") == 0
    assert "8:0.500  6:0.250  2:0.250" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma-rel", "0.3"], "sigma_rel = 0.3: the width of a power-law average lies between 0 and 0.2887"),
        (["--sigma-rel", "0"], "sigma_rel = 0"),
        (["--sigma-rel", "nan"], "expects a finite number"),
        (["--sigma-rel", "0.1", "--step", "5"], "--step 5: there are snapshots of steps 2, 4, 6, 8"),
        (["--step", "3"], "--step 3 leaves 1 snapshot"),
        (["--skip", "5"], "has no snapshot of this step, and none is missing"),
        (["--alpha", "0"], "alpha = 0"),
    ],
)
def test_what_cannot_be_made(run, arguments, message, capsys):
    assert tool(run, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (run / "posthoc").exists() or list((run / "posthoc").iterdir()) == []


@pytest.mark.parametrize("damage", ["none", "flip", "foreign"])
def test_what_was_tracked_wrongly_is_refused(run, damage, capsys):
    """Tracked averages as snapshots are: missing, damaged, or of another run."""
    if damage == "none":
        for folder in (run / "snapshots").glob("ema_*"):
            shutil.rmtree(folder)
        message = "holds no tracked averages: train with snapshot.ema"
    elif damage == "flip":
        path = run / "snapshots" / "ema_0.1" / "step-00000006.safetensors"
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        message = "ema_0.1/step-00000006.safetensors' is damaged"
    else:
        shutil.copy(run / "snapshots" / "step-00000006.safetensors", run / "snapshots" / "ema_0.1")
        message = "ema_0.1/step-00000006.safetensors' was not written after"
    assert tool(run, "--sigma-rel", "0.1") == 1
    assert message in capsys.readouterr().err
