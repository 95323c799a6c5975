"""The package as others get it: source distribution, wheel, a clean environment, another folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from dedistill import __version__
from dedistill.recipe.shipped import FOLDER, shipped_recipes

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
EACH = "import sys; from dedistill.cli.main import main; sys.exit(any(main(line.split()) for line in sys.argv[1:]))"
CHAIN = [
    "train dedistill:digits/teacher --set train.steps=20 --set train.warmup=2 --set validate.samples=32",
    "pairs dedistill:digits/teacher --out runs/digits/pairs --count 64 --steps 4 --points 4",
    "train dedistill:digits/student --set train.steps=8 --set train.warmup=1 --set validate.samples=32 --set train.batch=16",
    "train my.toml",
    "posthoc runs/my --alpha 0.9",
    "sweep my.toml --candidates last alpha_linear_0.9 --cfg 1 3 --prompts 2 --steps 2",
]
MINE = """extends = "dedistill:digits/dedistill"
train = {steps = 8, batch = 16, warmup = 1}
validate = {every = 4, samples = 32}
snapshot = {every = 4}
"""


def done(command: list[str], folder: Path) -> str:
    """Output of a command that must end well, without what this process was told of where the package lies."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    made = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert made.returncode == 0, f"{command}\n{made.stdout[-3000:]}"
    return made.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The ``dedistill`` of an environment that has the wheel, and this environment's libraries without this checkout."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    shutil.copytree(ROOT / "dedistill", source / "dedistill", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done([sys.executable, "-c", BUILD.format(kind="sdist"), str(folder)], source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    done([sys.executable, "-c", BUILD.format(kind="wheel"), str(folder)], folder / f"dedistill-{__version__}")
    (wheel,) = folder.glob("*.whl")
    done([sys.executable, "-m", "venv", "--without-pip", "clean"], folder)
    python = folder / "clean/bin/python"
    purelib = done([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    # a folder that a .pth names is searched, its own .pth files (this checkout's among them) are not read
    (Path(purelib) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], folder)
    return folder / "clean/bin/dedistill"


def test_the_wheel_has_all_that_is_no_code(installed):
    site = next(installed.parents[1].glob("lib/python*/site-packages/dedistill"))
    wanted = [f.relative_to(ROOT) for f in (ROOT / "dedistill").rglob("*") if f.suffix in (".toml", ".j2", ".js", ".json")]
    assert len(wanted) > 25 and all((site.parent / file).is_file() for file in wanted)
    assert FOLDER.is_relative_to(ROOT) and len(shipped_recipes()) > 10


def test_the_chain_of_digits_from_another_folder(installed, tmp_path):
    """Teacher, pairs, student, de-distilling by a recipe of one's own, averages, sweep: all of it shortened, in one process."""
    assert done([str(installed), "--version"], tmp_path).strip() == f"dedistill {__version__}"
    (tmp_path / "my.toml").write_text(MINE)
    python = str(installed.with_name("python"))
    done([python, "-c", EACH, *CHAIN], tmp_path)
    for made in ("student/model/transformer", "pairs/pairs.json"):
        assert (tmp_path / "runs/digits" / made).exists()
    assert (tmp_path / "runs/my/sweep/index.html").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.toml", "runs"]
    own = "import dedistill; print(dedistill.__file__)"
    assert str(installed.parents[1]) in done([python, "-c", own], tmp_path)


@pytest.mark.slow
def test_the_demo_from_another_folder(installed, tmp_path):
    """The story's claims hold, and a second call makes nothing anew."""
    said = done([str(installed), "demo"], tmp_path)
    assert "report: runs/digits/report/index.html" in said and "averages: runs/digits/dedistill/sweep/index.html" in said
    assert "de-distilled" in said and "yes" in said and "NO" not in said
    metrics = tmp_path / "runs/digits/dedistill/metrics.jsonl"
    before = metrics.read_bytes()
    again = done([str(installed), "demo"], tmp_path)
    assert again.count("already finished") == 3 and metrics.read_bytes() == before
