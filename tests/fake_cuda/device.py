"""To be imported before torch: in a CPU build of it, tensors without numbers can then lie on "cuda" and have gradients.

Without, autograd ends the process ("PyTorch is not linked with support for cuda devices"). A library of 60 lines, which g++
builds in seconds, and which is kept in the system's folder for temporary files.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
TORCH = Path(find_spec("torch").origin).parent


def library() -> Path:
    """Built for this torch and this source."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{TORCH} {(TORCH / 'version.py').read_text()}".encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"dedistill-fake-cuda-{key}.so"
    if not built.exists():
        new = built.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH}/include", str(SOURCE), "-o", str(new)]
        subprocess.run([*command, f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"], check=True)
        new.replace(built)
    return built


for name in (TORCH / "lib" / "libc10.so", TORCH / "lib" / "libtorch_cpu.so", library()):
    ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
