"""Who reads what a command prints may go away, as head does: that is no error."""

import subprocess
import sys

import pytest

COMMANDS = [["--help"], ["recipes"], ["recipes", "show", "flux_lora"], ["train", "dedistill:flux_lora", "--print-recipe"]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_reader_that_leaves_ends_the_command_quietly(words):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "dedistill", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # before a word is written
    assert process.stderr.read() == "" and process.wait() == 0
