"""An image is the same if its bytes are: edits within size and time are noticed, and copies are not taken for edits."""

import os
import shutil
import tarfile
import time

import pytest
from PIL import Image
from test_prepare import encode, encoded

from dedistill.data.images import decode
from dedistill.train import main


def keep_times(file, change) -> None:
    """``change`` a file that keeps its size and, as far as anyone can set it, its time."""
    status = file.stat()
    time.sleep(0.02)  # ticks of a file system's clock are some milliseconds apart
    change(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def repaint(file) -> None:
    """Another image in a file of the same size: PNG's last chunk may be followed by anything."""
    size = file.stat().st_size
    Image.new("RGB", Image.open(file).size, "red").save(file)
    file.write_bytes(file.read_bytes().ljust(size, b"\0"))


@pytest.mark.parametrize("sharded", [False, True], ids=["files", "tar"])
def test_a_image_edited_within_its_size_and_time_is_encoded_again(own, tmp_path, capsys, sharded):
    """And a run that was begun with the old one is not continued."""
    recipe, folder = own
    settings = [f"data.sets.0.path={tmp_path / 'tars'}"] if sharded else []
    if sharded:
        (tmp_path / "tars").mkdir()
        packed = tmp_path / "tars" / "a.tar"
        with tarfile.open(packed, "w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, file.name)
        before = (folder / "p03.png").read_bytes()
        repaint(folder / "p03.png")
    command = [str(recipe), *(w for s in settings for w in ("--set", s))]
    assert main(command) == 0 and encoded(encode(recipe, *settings)[1]) == []
    if sharded:
        after = (folder / "p03.png").read_bytes()
        keep_times(packed, lambda tar: tar.write_bytes(tar.read_bytes().replace(before, after)))
    else:
        keep_times(folder / "p03.png", repaint)
    capsys.readouterr()
    assert main([*command, "--set", "train.steps=4"]) == 1
    said = capsys.readouterr().err
    assert "encoded 1 of 1 image" in said and "data.sets: images, captions or crops differ" in said


def test_images_on_another_disk_are_the_same(own, tmp_path, capsys, monkeypatch):
    """Other inodes, ctimes and mtimes: read and compared, neither decoded nor encoded, and the run goes on."""
    recipe, folder = own
    assert main([str(recipe)]) == 0
    shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    (tmp_path / "moved").rename(folder)
    decoded = []
    monkeypatch.setattr(decode, "decode", lambda *a, **k: decoded.append(a))
    capsys.readouterr()
    assert main([str(recipe), "--set", "train.steps=4"]) == 0 and not decoded
    said = capsys.readouterr().err
    assert "continued from step 2" in said and "encoded" not in said
