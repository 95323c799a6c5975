"""The record of a run, read whatever somebody has done to it."""

import json
import shutil

import pytest
from tiny_recipes import TEACHER

from dedistill.runs.metrics import last_step, read_rows
from dedistill.train import main

ROW = {"step": 1, "loss": 1.0, "applied": True, "sigma_loss": [0.5, None]}


SAMPLES = [{"step": 2, key: value} for key in ("quarantined", "not_finite", "spike") for value in (5, [3], [{}])]


@pytest.mark.parametrize("row", [[], {"step": "2"}, {"step": 2, "sigma_loss": 1}, {"step": 2, "sigma_loss": ["x"]}, *SAMPLES])
def test_what_is_no_row_is_passed_over(tmp_path, row):
    left_out = ROW | {"step": 3, "quarantined": [{"sample": "a\u2028b\x85c"}]}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (ROW, row, left_out)) + '{"step": 4')
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [1, 3] and last_step(tmp_path / "m.jsonl") == 3


def lines_of(run):
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A recipe and its run of four steps, of which each has a row, with a checkpoint at the end."""
    folder = tmp_path_factory.mktemp("journal")
    (folder / "r.toml").write_text(TEACHER.format(out=folder, steps=4))
    assert main([str(folder / "r.toml"), *SETTINGS, "--set", "train.steps=4"]) == 0
    return folder


SETTINGS = [word for s in ("run.name=x", "checkpoint.every=2", "log.every=1", "validate.every=0") for word in ("--set", s)]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: [], "4 rows are missing or damaged of 4"),
        (lambda rows: [rows[0], rows[3]], "2 rows are missing or damaged of 4"),
        (lambda rows: [*rows[:2], '{"step": 3, "loss', rows[3]], "2 rows are missing or damaged of 4"),
        (lambda rows: [rows[0], "\0" * len(rows[1]) + "\n", *rows[2:]], "1 row is missing or damaged of 4"),
        (lambda rows: None, "4 rows are missing or damaged of 4"),
        (lambda rows: [*rows, '{"step": 5, "loss'], ""),
    ],
)
def test_rows_that_a_run_had_and_lost_are_told(stopped, tmp_path, capsys, damage, said):
    """The run goes on; a torn row after its last save is nothing that it had."""
    run = shutil.copytree(stopped, tmp_path / "copy") / "teacher"
    (tmp_path / "copy" / "r.toml").write_text((stopped / "r.toml").read_text().replace(str(stopped), str(tmp_path / "copy")))
    changed = damage(lines_of(run))
    (run / "metrics.jsonl").unlink() if changed is None else (run / "metrics.jsonl").write_text("".join(changed))
    assert main([str(tmp_path / "copy" / "r.toml"), *SETTINGS, "--set", "train.steps=6"]) == 0
    heard = capsys.readouterr().err
    assert said in heard and ("missing or damaged" in heard) == bool(said)
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")][-2:] == [5, 6]


def test_rows_that_were_not_asked_for_are_not_missed(stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "r.toml").write_text((stopped / "r.toml").read_text().replace(str(stopped), str(tmp_path)))
    for steps, every in ((7, 3), (9, 1)):
        assert main([str(tmp_path / "r.toml"), *SETTINGS, "--set", f"log.every={every}", "--set", f"train.steps={steps}"]) == 0
    assert [row["step"] for row in read_rows(tmp_path / "teacher" / "metrics.jsonl")] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert "missing" not in capsys.readouterr().err
