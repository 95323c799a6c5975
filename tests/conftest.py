"""Tiny real models and recipes that train in a fraction of a second."""

import gc
import os
import resource
import shutil
import subprocess
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forks import ForkedPython
from image_files import write_images
from tiers import LONG
from tiny_recipes import ADAPTER, IMAGES, TEACHER
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from dedistill.io import hashing

torch.set_num_threads(1)
os.fsync = lambda file: None  # no power is lost here, and to wait for a disk takes as long as all else


def is_long(file: Path) -> bool:
    return str(file.relative_to(Path(__file__).parent).with_suffix("")) in LONG


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Long files that are left out need not be imported, either, nor what they import."""
    left_out = collection_path.suffix == ".py" and "not long" in config.option.markexpr
    return True if left_out and is_long(collection_path) else None


def pytest_collection_finish() -> None:
    """All that was imported stays: half a million objects that no search for garbage need walk through again; and it is
    searched for less often than after every 700 objects."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # as a forecast calls it, which freezes what is there for a while
    gc.set_threshold(10_000, 10, 10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_long(item.path):
            item.add_marker("long")
    items.sort(key=lambda item: "long" not in item.keywords)  # short files last, so that no process waits for another


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory) -> Path:
    """Folder of a complete FLUX pipeline, shaped like schnell, with small random weights."""
    from dedistill.models.flux.tiny import write_tiny_flux

    folder = tmp_path_factory.mktemp("flux")
    write_tiny_flux(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Twelve captioned images that no test may change."""
    return write_images(tmp_path_factory.mktemp("photos") / "photos", 12)


@pytest.fixture
def image_recipe(tmp_path, tiny_flux, photos) -> Path:
    """Recipe file of a tiny FLUX on ``photos``, with a cache of its own in ``tmp_path/cache``."""
    file = tmp_path / "images.toml"
    file.write_text(IMAGES.format(out=tmp_path, base=tiny_flux, images=photos, cache=tmp_path / "cache"))
    return file


@pytest.fixture
def own(image_recipe, tmp_path, photos):
    """The recipe on a copy of the images, free to be changed; returns (recipe file, folder)."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    image_recipe.write_text(image_recipe.read_text().replace(str(photos), str(folder)))
    return image_recipe, folder


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """Folder of a tiny trained network."""
    from dedistill.train import main

    folder = tmp_path_factory.mktemp("base")
    recipe = folder / "teacher.toml"
    recipe.write_text(TEACHER.format(out=folder, steps=20))
    assert main([str(recipe), "--debug"]) == 0
    return folder / "teacher" / "model"


@pytest.fixture
def adapter_recipe(tmp_path, base_model) -> Path:
    """Recipe file of a tiny de-distillation into ``tmp_path/dedistill``."""
    file = tmp_path / "dedistill.toml"
    file.write_text(ADAPTER.format(out=tmp_path, base=base_model))
    return file


@pytest.fixture
def teacher_recipe(tmp_path) -> Path:
    file = tmp_path / "teacher.toml"
    file.write_text(TEACHER.format(out=tmp_path, steps=4))
    return file


@pytest.fixture
def forked_commands(monkeypatch):
    """``subprocess.Popen`` of ``python -m dedistill`` forks this process instead (forks.py)."""
    monkeypatch.setattr(subprocess, "Popen", ForkedPython)
    monkeypatch.setattr(subprocess_handler, "Popen", ForkedPython)  # torchrun's


@pytest.fixture
def files_read(monkeypatch) -> Counter:
    """How often each file was read whole for its hash, as a process that has read none yet counts it."""
    counter, read = Counter(), hashing.read_sha256

    def counted(path):
        counter[Path(path)] += 1
        return read(path)

    monkeypatch.setattr(hashing, "read_sha256", counted)
    monkeypatch.setattr(hashing, "_known", {})
    monkeypatch.setattr(hashing, "SETTLED_NS", 0)  # files of tests are never older than two seconds
    return counter


@pytest.fixture
def small_disk():
    """``with small_disk(n):`` the system refuses to make any file longer than n bytes, as a full disk would."""

    @contextmanager
    def limited(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
