"""Tracked averages in whole runs: what they average, what a resume keeps, what they cost a run without them."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file

from dedistill.distributed.outside import BY_SIGNAL
from dedistill.errors import RUN_AGAIN, UserError
from dedistill.posthoc.profiles import exponent
from dedistill.runs.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from dedistill.train import main
from dedistill.training.keeping import Averages
from dedistill.training.trainer import Trainer

FOLDERS = ("ema_0.05", "ema_0.1")


def arguments(recipe: Path, out: Path, *settings: str) -> list[str]:
    return [str(recipe), "--debug", *(a for s in (f"run.out={out}", *settings) for a in ("--set", s))]


def run(recipe: Path, out: Path, *settings: str) -> Path:
    assert main(arguments(recipe, out, *settings)) == 0
    return out


def snapshots(run_folder: Path, name: str = "") -> list[dict[str, torch.Tensor]]:
    return [load_file(p) for p in sorted((run_folder / "snapshots" / name).glob("step-*.safetensors"))]


def files(run_folder: Path) -> dict[str, bytes]:
    """Snapshots of all kinds, and the averages in the newest checkpoint, without headers, which hold the run's path."""
    state = list_checkpoints(run_folder / "checkpoints")[-1] / "ema.safetensors"
    found = {}
    for path in [*(run_folder / "snapshots").rglob("*.safetensors"), state]:
        raw = path.read_bytes()
        found[str(path.relative_to(run_folder))] = raw[8 + int.from_bytes(raw[:8], "little") :]
    return found


@pytest.fixture
def settings(tmp_path) -> tuple[str, ...]:
    return ("snapshot.ema=[0.05, 0.10]", "snapshot.every=1", "validate.every=100")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
def test_a_tracked_average_is_that_of_the_snapshots(adapter_recipe, tmp_path, settings, optimizer):
    """After each step, the power-weighted mean of the weights after every step so far; alpha buffers as they are."""
    precision = ["train.precision=bf16"] if optimizer == "adamw_bf16" else []
    out = run(adapter_recipe, tmp_path / "a", *settings, f"train.optimizer={optimizer}", *precision)
    raw = snapshots(out)
    for sigma, folder in zip((0.05, 0.1), FOLDERS):
        power = exponent(sigma) + 1
        found = snapshots(out, folder)
        assert len(found) == len(raw) == 6
        for k, means in enumerate(found, start=1):
            assert means.keys() == raw[0].keys()
            for name, mean in means.items():
                # the integral of gamma + 1 times tau^gamma over each step, over that over all
                parts = [((i / k) ** power - ((i - 1) / k) ** power) * raw[i - 1][name].double() for i in range(1, k + 1)]
                assert mean.dtype == torch.float32
                torch.testing.assert_close(mean.double(), sum(parts), rtol=2e-6, atol=2e-7)
    with safe_open(out / "snapshots" / "ema_0.05" / "step-00000006.safetensors", framework="pt") as f:
        assert f.metadata()["dedistill.ema"] == "power sigma_rel=0.05" and f.metadata()["dedistill.step"] == "6"


@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_equals_uninterrupted(adapter_recipe, tmp_path, settings, stop, monkeypatch):
    """Every snapshot and the state itself, bit for bit; without the state it would not be."""
    a = run(adapter_recipe, tmp_path / "a", *settings)
    original = Trainer.train_step

    def stopping(self, step, tasks):
        row = original(self, step, tasks)
        if step + 1 == stop:
            self.stopping = BY_SIGNAL
        return row

    monkeypatch.setattr(Trainer, "train_step", stopping)
    assert main(arguments(adapter_recipe, tmp_path / "b", *settings)) == RUN_AGAIN
    monkeypatch.undo()
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    b = run(adapter_recipe, tmp_path / "b", *settings)
    assert files(a) == files(b) and len(files(a)) == 3 * 6 + 1
    last = list_checkpoints(tmp_path / "c" / "checkpoints")[-1]
    groups, manifest = read_checkpoint(last)
    groups["ema"] = {name: torch.zeros_like(t) for name, t in groups["ema"].items()}
    shutil.rmtree(last)
    save_checkpoint(last.parent, manifest["step"], groups, {k: v for k, v in manifest.items() if k != "files"}, keep=2)
    assert files(a) != files(run(adapter_recipe, tmp_path / "c", *settings))


def test_two_processes_track_what_one_does(adapter_recipe, tmp_path, settings):
    """With exact gradients bit for bit; rank 0 alone writes."""
    alone = run(adapter_recipe, tmp_path / "one", *settings, "train.exact=true")
    said = tmp_path / "said"
    codes = run_ranks(2, main, arguments(adapter_recipe, tmp_path / "two", *settings, "train.exact=true"), said=said)
    assert codes == [0, 0], (said / "0").read_text()[-1500:]
    assert files(alone) == files(tmp_path / "two")


def test_without_the_key_nothing_is_kept(adapter_recipe, tmp_path, settings):
    """Off by default; and tracking changes nothing of the training."""
    plain, tracked = run(adapter_recipe, tmp_path / "a", *settings[1:]), run(adapter_recipe, tmp_path / "b", *settings)
    assert [p.name for p in (plain / "snapshots").iterdir() if p.is_dir()] == []
    last = [list_checkpoints(f / "checkpoints")[-1] for f in (plain, tracked)]
    assert {p.name for p in last[1].iterdir()} - {p.name for p in last[0].iterdir()} == {"ema.safetensors"}
    assert all(torch.equal(x[n], y[n]) for x, y in zip(snapshots(plain), snapshots(tracked)) for n in x)


@pytest.mark.parametrize(("before", "now"), [(0, 1), (1, 0)])
def test_a_run_goes_on_as_it_began(adapter_recipe, tmp_path, settings, before, now, capsys):
    """An average that was not tracked from the start cannot be made up for."""
    sets = [settings[1:], settings]
    run(adapter_recipe, tmp_path / "a", *sets[before], "train.steps=4")
    assert main(arguments(adapter_recipe, tmp_path / "a", *sets[now], "train.steps=6")) == 1
    said = capsys.readouterr().err
    assert "snapshot.ema" in said and "set another run.out" in said


def test_a_checkpoint_without_its_averages_is_refused(adapter_recipe, tmp_path, settings, capsys):
    out = run(adapter_recipe, tmp_path / "a", *settings, "train.steps=4")
    for checkpoint in list_checkpoints(out / "checkpoints"):
        groups, manifest = read_checkpoint(checkpoint)
        del groups["ema"]
        shutil.rmtree(checkpoint)
        save_checkpoint(
            checkpoint.parent, manifest["step"], groups, {k: v for k, v in manifest.items() if k != "files"}, keep=2
        )
    assert main(arguments(adapter_recipe, tmp_path / "a", *settings, "train.steps=6")) == 1
    assert "the averages in" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "message"), [
    (["snapshot.every=0", "snapshot.ema=[0.05, 0.1]"], "has no effect while snapshot.every is 0"),
    (["snapshot.ema=[0.1, 0.1]"], "the two widths are the same"),
    (["snapshot.ema=[0.05, 0.3]"], "at most 0.28"),
    (["snapshot.ema=[0.05]"], "at least 2"),
])  # fmt: skip
def test_widths_that_make_no_sense(adapter_recipe, tmp_path, setting, message, capsys):
    assert main(arguments(adapter_recipe, tmp_path / "a", *setting)) == 2
    said = capsys.readouterr().err
    assert "snapshot.ema" in said and message in said


def test_time_passes_over_steps_that_are_not_taken_in():
    """The share of the new weights is that of all the steps since the last update."""
    weight = {"w": torch.tensor([1.0])}
    often, seldom = Averages([0.1], weight), Averages([0.1], weight)
    for step in range(1, 41):
        weight["w"].fill_(1.0 if step <= 20 else 3.0)
        often.update(step)
        if step in (20, 40):
            seldom.update(step)
    for averages in (often, seldom):
        state = averages.state()["ema"]
        assert state["time"] == 40 and float(state["0.1/w"]) == pytest.approx(3 - 2 * 0.5 ** (exponent(0.1) + 1), rel=1e-6)


def test_state_of_other_weights_is_refused():
    averages = Averages([0.05, 0.1], {"w": torch.ones(3)})
    good = {"0.05/w": torch.ones(3), "0.1/w": torch.ones(3), "time": torch.tensor(7)}
    for wrong in (
        {},
        {"0.05/w": torch.ones(3)},
        good | {"0.1/w": torch.ones(4)},
        {k: v for k, v in good.items() if k != "time"},
    ):
        with pytest.raises(UserError, match="the averages in 'here' do not fit"):
            averages.load({"ema": wrong}, "here")
    assert all(float(t.abs().max()) == 0 for t in averages.state()["ema"].values())
