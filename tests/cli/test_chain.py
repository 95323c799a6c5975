"""A chain runs its stages in order, goes on after a stop, and is refused where it says what cannot be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dedistill.cli.chain import running
from dedistill.cli.main import main
from dedistill.cli.plan_chain import StageCost
from dedistill.errors import UserError
from dedistill.io import ownership
from dedistill.models.sd15 import full_config
from dedistill.models.unet.tiny import write_tiny_unet
from dedistill.recipe import load_recipe
from dedistill.recipe.chain import load_chain
from dedistill.recipe.shipped import FOLDER

SHORT = 'extends = "dedistill:digits/{0}"\n[run]\nout = "out/{0}"\n'
CHAIN = """
out = "out"
[[stages]]
name = "teacher"
command = "train"
recipe = "teacher"
scaled = ["train.steps", "train.warmup", "checkpoint.every", "validate.every"]
[[stages]]
name = "pairs"
command = "pairs"
recipe = "teacher"
options = ["--out", "out/pairs", "--count", "1600", "--steps", "4", "--shard-size", "4"]
scaled = ["--count", "train.steps", "train.warmup", "checkpoint.every", "validate.every"]
"""


@pytest.fixture
def chain(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "teacher.toml").write_text(SHORT.format("teacher"))
    (tmp_path / "mine" / "chain.toml").write_text(CHAIN)
    return tmp_path / "mine" / "chain.toml"


def dedistill(*words: str, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dedistill", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more
    )


def test_a_scale_multiplies_what_the_chain_says_and_leaves_the_rest(chain, capsys):
    assert main(["chain", "mine", "--dry-run", "--scale", "0.05"]) == 0
    train, pairs = capsys.readouterr().out.splitlines()
    steps = json.loads(subprocess.check_output([sys.executable, "-c", STEPS], text=True))
    assert f"--set train.steps={round(steps * 0.05)}" in train and train.startswith("dedistill train mine/teacher.toml")
    assert "--count 80 " in pairs and "--steps 4" in pairs
    chain.write_text(f"scale = 0.05\n{chain.read_text()}")
    assert main(["chain", "mine", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [train, pairs]


STEPS = "from dedistill.recipe import load_recipe as r; print(r('dedistill:digits/teacher').train.steps)"


def test_a_launcher_starts_what_several_processes_share(chain, capsys):
    chain.write_text(chain.read_text() + '[[stages]]\nname = "look"\ncommand = "sweep"\nrecipe = ["teacher", "teacher"]\n')
    assert main(["chain", "mine", "--dry-run", "--launch", "gpus.yaml"]) == 0
    train, pairs, look = capsys.readouterr().out.splitlines()
    assert train == "dedistill launch --config_file gpus.yaml mine/teacher.toml"
    assert pairs.startswith("dedistill launch --config_file gpus.yaml pairs mine/teacher.toml --out out/pairs --count 1600 ")
    assert look == "dedistill sweep mine/teacher.toml mine/teacher.toml"


def test_a_rehearsal_is_the_same_chain_written_small(chain, capsys):
    """Elsewhere as a whole; what one stage makes the next one uses."""
    student = SHORT.format("student") + '[model]\npath = "out/teacher/model"\n[data]\npath = "out/pairs"\n'
    (chain.parent / "student.toml").write_text(student)
    stage = '[[stages]]\nname = "student"\ncommand = "train"\nrecipe = "student"\nscaled = ["train.steps"]\n'
    look = '[[stages]]\nname = "look"\ncommand = "sweep"\nrecipe = ["student", "teacher"]\n'
    look += 'options = ["--prompts", "own/prompts.txt"]\n'
    chain.write_text(chain.read_text() + stage + look)
    assert main(["chain", "mine", "--dry-run", "--rehearse"]) == 0
    train, pairs, second, sweep = capsys.readouterr().out.splitlines()
    recipes = "out-rehearsal/recipes"
    assert train == f"dedistill train {recipes}/teacher.toml" and second == f"dedistill train {recipes}/student.toml"
    assert pairs.split()[2:6] == [f"{recipes}/teacher.toml", "--out", "out-rehearsal/pairs", "--count"]
    assert int(pairs.split()[6]) < 50 and "--shard-size 4" in pairs
    assert sweep == f"dedistill sweep {recipes}/student.toml {recipes}/teacher.toml --prompts out-rehearsal/prompts.txt"
    assert len(Path("out-rehearsal/prompts.txt").read_text().splitlines()) > 16 and not Path("out").exists()
    teacher, student = (load_recipe(f"{recipes}/{name}.toml") for name in ("teacher", "student"))
    assert teacher.train.steps < 10 and teacher.run.out == "out-rehearsal/teacher"
    assert (student.model.path, student.data.path) == ("out-rehearsal/teacher/model", "out-rehearsal/pairs")
    chain.write_text(chain.read_text().replace('out = "out"', 'out = "other"'))
    assert main(["chain", "mine", "--rehearse"]) == 2
    assert "mine/teacher.toml:3: run.out: 'out/teacher' is not in the chain's folder 'other'" in capsys.readouterr().err


def test_notes_in_a_rehearsal_stay_when_it_is_made_again(chain):
    """What stages made goes, by their marks; what the user put there does not."""
    assert main(["chain", "mine", "--dry-run", "--rehearse"]) == 0
    kept, gone = ("notes.txt", "my.log", "mine/x"), ("recipes/old.toml", "sweep/x", "merged/x")
    for name in (*kept, *gone):
        Path("out-rehearsal", name).parent.mkdir(exist_ok=True)
        Path("out-rehearsal", name).write_text("x")
    ownership.mark(Path("out-rehearsal/sweep"), "sweep")
    Path("out-rehearsal/merged/dedistill.json").write_text("{}")
    assert main(["chain", "mine", "--dry-run", "--rehearse"]) == 0
    assert all(Path("out-rehearsal", name).exists() for name in kept)
    assert not any(Path("out-rehearsal", name).exists() for name in gone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["instaflow_sd15", "instaflow_sdxl"])
def test_all_of_instaflow_s_way_is_rehearsed(name, tmp_path, monkeypatch):
    """On a tiny network of the base's classes, to numbers at 1, 2, 4 and 8 steps."""
    monkeypatch.chdir(tmp_path)
    assert main(["chain", f"dedistill:{name}", "--rehearse"]) == 0
    out = Path(f"runs/{name}-rehearsal")
    first, second = (json.loads((out / name / "pairs.json").read_text()) for name in ("pairs", "pairs2"))
    assert (first["cfg"], second["cfg"]) == (6, 1.5) and first["teacher"] != second["teacher"]
    (scores,) = out.glob("distill_features/evaluation/**/scores.json")
    cells = json.loads(scores.read_text())["cells"]
    assert {cell["steps"] for cell in cells} == {1, 2, 4, 8} and len({cell["candidate"] for cell in cells}) == 2


def test_instaflow_s_figures_are_those_of_its_cards():
    """Days of an A100 at 4.63 samples a second, as the model cards say them."""
    chain = load_chain("dedistill:instaflow_sd15")
    days, cards = [], [11.2, 64.0, 54.4]
    for stage in chain.stages:
        if stage.command == "train":
            train = load_recipe(chain.recipes(stage)[0]).train
            days.append(train.batch * train.steps / 4.63 / 86_400)
    assert days[:3] == pytest.approx(cards, rel=0.02) and days[3] == pytest.approx(1024 * 18_000 / 4.63 / 86_400)


PRICED = """
out = "out"
[[stages]]
name = "first"
command = "pairs"
recipe = "reflow"
options = ["--base", "--out", "out/pairs", "--count", "1000", "--cfg", "6", "--solver", "unipc", "--steps", "24"]
scaled = ["--count"]
[[stages]]
name = "train"
command = "train"
recipe = "reflow"
scaled = ["train.steps"]
[[stages]]
name = "plain"
command = "pairs"
recipe = "reflow"
options = ["--out", "out/more", "--count", "1000", "--cfg", "1", "--solver", "heun", "--steps", "4"]
"""
REFLOW = """
run = {name = "a", out = "out/a"}
model = {family = "sd15", path = "models/sd15"}
data = {source = "pairs", path = "out/pairs"}
sample = {height = 64, width = 64}
[train]
objective = "reflow"
steps = 100
batch = 8
micro_batch = 2
lr = 1e-4
precision = "bf16"
gradient_checkpointing = true
"""


def test_a_plan_of_a_chain_counts_pairs_visits_and_days(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "chain.toml").write_text(PRICED)
    (tmp_path / "mine" / "reflow.toml").write_text(REFLOW)
    write_tiny_unet(tmp_path / "models" / "sd15", full_config("", False))
    assert main(["plan", "mine", "--json", "--scale", "10"]) == 0
    first, train, plain = json.loads(capsys.readouterr().out)["stages"]
    assert (first["pairs"], first["nfe"], first["visits"]) == (10_000, 48, 0)
    assert (train["pairs"], train["visits"]) == (0, 1000 * 8)
    assert (plain["pairs"], plain["nfe"]) == (1000, 7)  # the last step of Heun's is Euler's
    for card in ("A100 80GB", "RTX 4090"):
        per_call = first["seconds"][card] / (10_000 * 48)
        assert plain["seconds"][card] == pytest.approx(per_call * 1000 * 7)
        assert 2 < train["seconds"][card] / 8000 / per_call < 6  # forward, again for what is recomputed, and backward
        assert train["fits"][card] == "fits"
    trained, made = StageCost("a", visits=2 * 86_400), StageCost("b", pairs=100, nfe=50, share=0.25)
    assert trained.days_at(4) == 0.5 and made.days_at(2) == pytest.approx(100 * 50 * 0.25 / 2 / 86_400)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=str)
def test_requests_to_stop_are_heard_where_a_shell_has_sigint_ignored(chain, number):
    """As for what a script begins in the background. Of nohup's SIGHUP nothing is heard."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    with pytest.raises(UserError, match="stopped; continue with: again"), running(load_chain("mine"), [], "again"):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.signal(signal.SIGINT, before) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with running(load_chain("mine"), [], "again"):
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, outside)


@pytest.mark.parametrize("until", [pytest.param("teacher/metrics.jsonl", marks=pytest.mark.slow), "pairs/00003.tar"])
def test_a_stopped_chain_goes_on_and_only_one_works_in_a_folder(chain, until, forked_commands):
    tiny = "[model.new]\nlayers = 1\nsingle_layers = 1\nheads = 2\n"
    (chain.parent / "teacher.toml").write_text(SHORT.format("teacher") + tiny)
    words = ("chain", "mine", "--scale", "0.04")
    first = dedistill(*words)
    while first.poll() is None and not Path("out", until).exists():
        time.sleep(0.05)
    second = dedistill(*words)
    assert second.wait() == 1 and "another process" in second.stderr.read()
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == 75
    said = first.stderr.read()
    assert said.splitlines()[-1] == "error: stopped; continue with: dedistill chain mine --scale 0.04"
    again = dedistill(*words)
    assert again.wait() == 0, again.stderr.read()
    made = json.loads(Path("out/pairs/pairs.json").read_text())
    assert made["count"] == sum(shard["pairs"] for shard in made["shards"]) == 64 and made["complete"]
    assert len(json.loads(Path("out/chain.json").read_text())["stages"]) == 2


@pytest.mark.long
def test_a_killed_chain_leaves_nothing_that_holds_its_folders(chain, forked_commands):
    """Run again at once it goes on; what it had started has ended with it."""
    tiny = "[model.new]\nlayers = 1\nsingle_layers = 1\nheads = 2\n[checkpoint]\nevery = 2\n"
    (chain.parent / "teacher.toml").write_text(SHORT.format("teacher") + tiny)
    words = ("chain", "mine", "--scale", "0.04")
    first = dedistill(*words)
    while first.poll() is None and not list(Path("out/teacher/checkpoints").glob("*/manifest.json")):
        time.sleep(0.02)
    first.kill()
    first.stderr.read()  # to the end of all that could write there: a fork begins too soon to meet none of it
    assert not Path("out/teacher/model").exists(), "it was trained to its end"
    again = dedistill(*words)
    assert again.wait() == 0, again.stderr.read()
    assert "done: 64 pairs" in again.stderr.read()


FAMILY = """
import os, subprocess, sys, time
from pathlib import Path
from dedistill.distributed.outside import end_with_parent
end_with_parent()
older, *younger = sys.argv[1:]
os.environ.setdefault("DEDISTILL_WORKS_FOR", str(os.getpid()))
Path(older).write_text(str(os.getpid()))
subprocess.run([sys.executable, "-c", Path("family.py").read_text(), *younger]) if younger else time.sleep(60)
"""


def test_what_a_killed_command_had_started_ends_with_it_at_any_depth(tmp_path):
    """As below a launcher, which is killed as well and can tell nobody."""
    (tmp_path / "family.py").write_text(FAMILY)
    names = ("chain", "launcher", "rank")
    oldest = subprocess.Popen([sys.executable, "-c", FAMILY, *names], cwd=tmp_path)
    until(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in names))
    pids = [int((tmp_path / name).read_text()) for name in names[1:]]
    assert all(map(alive, pids))
    oldest.kill()
    oldest.wait()
    until(lambda: not any(map(alive, pids)))


def until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_whose_owner_has_gone_already_does_not_begin(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv("DEDISTILL_WORKS_FOR", str(gone.pid))
    code = "from dedistill.cli.main import main; main(['--version'])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 75 and "dedistill" not in ended.stdout


@pytest.mark.parametrize(
    "change, wanted",
    [
        (('command = "train"', 'command = "rm"'), "chain.toml:5: stages.0.command"),
        (('scaled = ["--count", ', 'scaled = ["--counts", '), "'--counts'"),
        (('"--count", "1600"', '"--count", "many"'), "'--count'"),
        (('"train.steps", "train.warmup", "checkpoint.every", "validate.every"]\n[[', '"train.stepz"]\n[['), "'train.stepz'"),
        (('name = "pairs"', 'name = "teacher"'), "two stages are called 'teacher'"),
        (('name = "pairs"', 'name = "pairs"\nrecipes = "x"'), "chain.toml:10: stages.1.recipes"),
        (('out = "out"', ""), "chain.toml: out"),
        (("[[stages]]", "[[stages]"), "chain.toml: cannot be read"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_before_anything_runs(chain, capsys, change, wanted):
    text = chain.read_text()
    assert change[0] in text
    chain.write_text(text.replace(*change, 1))
    assert main(["chain", "mine"]) == 2
    assert wanted in capsys.readouterr().err
    assert not Path("out").exists()


def test_chains_that_come_with_the_package_name_recipes_that_are_there():
    for file in FOLDER.rglob("chain.toml"):
        chain = load_chain(f"dedistill:{file.parent.relative_to(FOLDER)}")
        assert all(len(chain.words(stage, 0.5)) > 1 for stage in chain.stages)
