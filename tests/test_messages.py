"""What messages and pages share: amounts of things in words."""

import errno
import io
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from dedistill.cli.command import BrokenPipeTolerant, guarded
from dedistill.errors import RUN_AGAIN, UserError, amount, enough_memory, printable, say
from dedistill.models.pretrained import reading
from dedistill.report.pages import render


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (0, ("group",), "0 groups"),
        (1, ("group",), "1 group"),
        (1234, ("image",), "1,234 images"),
        (1, ("tensor is", "tensors are"), "1 tensor is"),
        (2, ("tensor is", "tensors are"), "2 tensors are"),
    ],
)
def test_amounts_agree_with_their_words(number, words, text):
    assert amount(number, *words) == text


def test_templates_say_amounts_alike(tmp_path):
    (tmp_path / "t.j2").write_text('{{ 1 | amount("group") }}, {{ [1, 2] | length | amount("entry", "entries") }}')
    assert render("t.j2", tmp_path) == "1 group, 2 entries"


@pytest.mark.parametrize(
    "sign", ["\x1b]0;mine\x07", "\x1b[2J", "\r", "\x9b31m", "\x7f", "\x08", "\u202egnp.", "\u2067", "\u2028", "\udcff"]
)
def test_nothing_that_controls_a_terminal_reaches_it(capsys, sign):
    def fail():
        raise UserError(f"a{sign}b cannot be read")

    def break_down():
        raise ValueError(f"a{sign}b")

    say(f"left out: a{sign}b")
    assert guarded(fail, debug=False) == 1 and guarded(break_down, debug=False) == 70
    said = capsys.readouterr().err
    assert sign not in said and len(re.findall(r"\\[xu]", said)) == 3 * len([c for c in sign if not " " <= c <= "~"])
    assert printable("ü\t\n漢") == "ü\t\n漢"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory", "x.safetensors"),
    ],
)
def test_memory_that_runs_out_is_no_fault_of_ours(capsys, error):
    def fail():
        raise error

    def named():
        with enough_memory("decoding x"):
            raise error

    assert guarded(fail, debug=False) == guarded(named, debug=False) == RUN_AGAIN
    assert capsys.readouterr().err.count("memory") >= 2


@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 46), lambda: np.empty(1 << 46)])
def test_memory_that_is_refused_is_told_apart_by_every_reader(ask):
    """A loader of the libraries', which takes any error for damage, and what wraps an error once more."""

    def wrapped():
        try:
            ask()
        except Exception as e:
            raise UserError("'x' cannot be read") from e

    def read():
        with reading("model.path: 'x' cannot be loaded"):
            ask()

    assert guarded(wrapped, debug=False) == guarded(read, debug=False) == RUN_AGAIN


# a process of its own: one that has run has room from before
SHORT_OF_MEMORY = """
import os, resource, sys
from pathlib import Path
from PIL import Image
from dedistill.data.images.decode import BadImage, decode
from dedistill.errors import RUN_AGAIN, is_out_of_memory
Image.init()  # readers of formats are libraries, which take memory themselves
data = sys.stdin.buffer.read()
used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
most = used + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    decode(data)
except BadImage:
    os._exit(1)
except Exception as e:
    os._exit(RUN_AGAIN if is_out_of_memory(e) else 2)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "format", "spare"), [("RGBA", "PNG", 20), ("L", "JPEG", 20), ("RGB", "BMP", 20), ("RGB", "AVIF", 60)]
)
def test_no_image_is_bad_for_want_of_memory(mode, format, spare):
    """Else it would be left out of training without a word that is true. spare: MB; with fewer AVIF gives no cause."""
    data = io.BytesIO()
    Image.new(mode, (5000, 5000)).save(data, format)

    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, str(spare)], input=data.getvalue(), capture_output=True)
    assert done.returncode == RUN_AGAIN, done.stderr.decode()


@pytest.mark.parametrize(
    "error", [AssertionError("already registered"), FileNotFoundError(2, "No usable folder"), UserError("x")]
)
def test_a_system_without_a_folder_for_temporary_files_is_told(capsys, monkeypatch, error, tmp_path):
    """Libraries need one, and fail in ways of their own."""

    def fail():
        raise error

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    assert guarded(fail, debug=False) == 1
    said = capsys.readouterr().err
    assert "set TMPDIR to one" in said and "internal error" not in said


def test_too_many_open_files_are_told_with_the_way_out(capsys):
    def wrapped():
        try:
            raise OSError(errno.EMFILE, "Too many open files", "x.safetensors")
        except OSError as e:
            raise UserError("snapshot 'x.safetensors' cannot be read") from e

    def plain():
        raise OSError(errno.ENFILE, "Too many open files in system", "x")

    assert guarded(wrapped, debug=False) == guarded(plain, debug=False) == 1
    assert capsys.readouterr().err.count("ulimit -n") == 2


def test_other_errors_pass_through_where_memory_is_looked_at():
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("decoding x"):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_spelt_out(encoding):
    raw = io.BytesIO()
    out = BrokenPipeTolerant(io.TextIOWrapper(raw, encoding=encoding))
    print("漢 and 7", file=out, flush=True)
    assert raw.getvalue() == b"\\u6f22 and 7\n"
