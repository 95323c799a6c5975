"""Files: whole or not there, and a disk that is really full says which one."""

import os
import signal
from pathlib import Path

import pytest

from dedistill.errors import UserError
from dedistill.io.atomic import WholeFile, replace_file, step_name, step_of, temporary_folder, whole_folder
from dedistill.runs.metrics import JsonlWriter
from tests.faults.harness import forked


def test_a_full_disk_keeps_the_old_file_and_names_it(tmp_path, small_disk):
    path = tmp_path / "a.json"
    replace_file(path, b"old")
    with small_disk(1000), pytest.raises(UserError, match=rf"cannot write '{path}' \(5,000 bytes\): File too large"):
        replace_file(path, b"x" * 5000)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_written_in_pieces_appears_when_it_is_complete(tmp_path, small_disk):
    path = tmp_path / "a"
    with WholeFile(path) as file:
        file.write(b"one")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"onetwo" and list(tmp_path.iterdir()) == [path]
    with small_disk(100_000), pytest.raises(UserError, match=f"cannot write '{path}'"), WholeFile(path) as file:
        for _ in range(4):
            file.write(b"y" * 40_000)
    assert path.read_bytes() == b"onetwo" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=f"cannot write '{tmp_path / 'gone' / 'a'}': No such file"):
        replace_file(tmp_path / "gone" / "a", b"")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000030", 30),
        ("step-00000030.safetensors", 30),
        ("step-123456789", 123456789),
        ("step-00000030.bad", None),
        ("step-00000030.tmp-12", None),
        ("last.safetensors", None),
    ],
)
def test_steps_are_read_from_names(name, step):
    assert step_of(Path("folder") / name) == step
    assert step is None or name.startswith(step_name(step))


def test_journal_on_a_full_disk(tmp_path, small_disk):
    """On opening, when it is rewritten, and on every line."""
    path = tmp_path / "metrics.jsonl"
    journal = JsonlWriter(path, 0)
    for step in range(1, 50):
        journal.write({"step": step, "text": "x" * 90})
    journal.close()
    before = path.read_bytes()
    with small_disk(2000), pytest.raises(UserError, match=rf"cannot write '{path}' \([\d,]+ bytes\): File too large"):
        JsonlWriter(path, 100)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    journal = JsonlWriter(path, 100)
    with small_disk(len(before)), pytest.raises(UserError, match=f"cannot write '{path}'"):
        try:
            journal.write({"step": 101})
        finally:
            journal.close()  # must not hide the message behind an error of its own
    assert path.read_bytes() == before


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n5\n"step"\n[]\n{"loss": 2}\n{"step": 2}\n{"step": 3')
    JsonlWriter(path, 9).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# --- what killed writers leave


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_file(path):
    with WholeFile(path) as file:
        file.write(b"x" * 100_000)
        kill_myself()


def killed_folder(path):
    with whole_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "part").write_bytes(b"x")
        kill_myself()


def killed_scratch(path):
    with temporary_folder(path) as folder, WholeFile(folder / "inner") as file:
        file.write(b"x" * 100_000)
        kill_myself()


def new_file(path):
    replace_file(path, b"new")


def new_folder(path):
    with whole_folder(path) as folder:
        assert not list(folder.iterdir())
        (folder / "file").write_bytes(b"new")


@pytest.mark.parametrize(
    ("killed", "again"), [(killed_file, new_file), (killed_folder, new_folder), (killed_scratch, new_folder)]
)
def test_what_a_killed_writer_left_is_gone_after_the_next_one(tmp_path, killed, again):
    path = tmp_path / "result"
    for _ in range(2):
        assert os.WTERMSIG(forked(lambda: killed(path))) == signal.SIGKILL
        assert [p.name for p in tmp_path.iterdir()] == ["result.tmp-dedistill"], "the second used the name of the first"
    again(path)
    assert (
        list(tmp_path.iterdir()) == [path] and (path.read_bytes() if path.is_file() else (path / "file").read_bytes()) == b"new"
    )


@pytest.mark.parametrize("kind", [WholeFile, whole_folder])
def test_two_that_write_at_once_do_not_meet(tmp_path, kind):
    """Neither takes what the other is writing for an orphan; the later one stays."""

    def fill(opened, text):
        opened.write(text) if kind is WholeFile else (opened / "text").write_bytes(text)

    path = tmp_path / "result"
    with kind(path) as first:
        fill(first, b"first")
        with kind(path) as second:
            fill(second, b"second")
        assert (path if kind is WholeFile else path / "text").read_bytes() == b"second"
    assert (path if kind is WholeFile else path / "text").read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [new_file, new_folder])
def test_a_link_of_that_name_is_not_followed(tmp_path, write):
    mine = tmp_path / "mine"
    mine.mkdir() if write is new_folder else mine.write_text("precious")
    (tmp_path / "result.tmp-dedistill").symlink_to(mine)
    write(tmp_path / "result")
    assert (tmp_path / "result").exists() and (mine.is_dir() or mine.read_text() == "precious")


def test_a_folder_whose_replacement_was_killed_is_put_back(tmp_path):
    path = tmp_path / "result"
    new_folder(path)
    path.rename(tmp_path / "result.tmp-dedistill-old")
    with pytest.raises(ZeroDivisionError), whole_folder(path):
        raise ZeroDivisionError
    assert (path / "file").read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
