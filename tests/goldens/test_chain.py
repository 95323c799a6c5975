"""The small chains give the numbers and bytes that were recorded."""

import json
from pathlib import Path

import pytest

from goldens import chain

RECORD = json.loads(Path(__file__).with_name("record.json").read_text())


@pytest.mark.slow
def test_every_number_and_tensor_is_the_recorded_one(tmp_path):
    if RECORD["fingerprint"] != chain.fingerprint():
        pytest.skip(f"recorded on {RECORD['fingerprint']}, this is {chain.fingerprint()}: record both trees here and compare")
    found = chain.record(tmp_path)
    assert found.keys() == RECORD["record"].keys()
    assert [place for place in found if found[place] != RECORD["record"][place]] == []
