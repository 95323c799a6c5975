"""The record of a run, read whatever somebody has done to it."""

import json

import pytest

from dedistill.runs.metrics import last_step, read_rows

ROW = {"step": 1, "loss": 1.0, "applied": True, "sigma_loss": [0.5, None]}


SAMPLES = [{"step": 2, key: value} for key in ("quarantined", "not_finite", "spike") for value in (5, [3], [{}])]


@pytest.mark.parametrize("row", [[], {"step": "2"}, {"step": 2, "sigma_loss": 1}, {"step": 2, "sigma_loss": ["x"]}, *SAMPLES])
def test_what_is_no_row_is_passed_over(tmp_path, row):
    left_out = ROW | {"step": 3, "quarantined": [{"sample": "a\u2028b\x85c"}]}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (ROW, row, left_out)) + '{"step": 4')
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [1, 3] and last_step(tmp_path / "m.jsonl") == 3
