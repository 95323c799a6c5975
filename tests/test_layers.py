"""Who may import whom (docs/decisions/0001-layers.md), and where a family's name may occur."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import LONG

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dedistill"
LEVELS = [
    {"errors", "flow", "kernels"},
    {"distributed", "io"},
    {"adapters", "recipe"},
    {"models"},
    {"data", "release"},
    {"objectives", "posthoc", "runs", "sampling"},
    {"evaluation"},
    {"report", "training"},
    {"forecast"},
    {"cli"},
    {"train", "__main__"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))
parse = functools.cache(ast.parse)
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(text: str) -> set[str]:
    """Parts of the package that a module imports, however it spells it; importing the package itself counts as all."""
    found = set()
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            if node.module == "dedistill":
                found |= {a.name if a.name in LEVEL else "train" for a in node.names if a.name != "__version__"}
            elif node.module.startswith("dedistill."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found |= {name[1] if len(name) > 1 else "train" for name in names if name[0] == "dedistill"}
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from dedistill.training.trainer import Trainer", {"training"}),
        ("from dedistill import training", {"training"}),
        ("def f():\n    from dedistill import flow, report as r", {"flow", "report"}),
        ("import dedistill.data.source as o, os", {"data"}),
        ("import dedistill", {"train"}),
        ("from dedistill import *", {"train"}),
        ("from dedistill import __version__", set()),
        ("from dedistillery import training\nimport torch", set()),
    ],
)
def test_every_spelling_of_an_import_is_seen(text, found):
    assert imports(text) == found


@pytest.mark.parametrize("path", [f for f in FILES if part(f) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = part(path)
    wrong = {other for other in imports(path.read_text()) - {own} if LEVEL[other] >= LEVEL[own]}
    assert not wrong, f"{path} imports {wrong}"


def test_every_part_has_a_level_and_no_module_is_loose():
    assert {part(f) for f in FILES} - {"__init__"} == set(LEVEL)
    assert {f.stem for f in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors", "train"}


def modules_imported(path: Path) -> set[str]:
    """Dotted names of modules of the package that a file imports, also inside functions and for types only."""
    found = set()
    for node in ast.walk(parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found & set(MODULES)


def test_no_imports_go_round_in_a_circle():
    below = {name: modules_imported(path) - {name} for name, path in MODULES.items()}
    while free := [name for name, needed in below.items() if not needed & below.keys()]:
        below = {name: needed for name, needed in below.items() if name not in free}
    assert not below, f"in circles, or above one: {below}"


def test_files_and_functions_are_short():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.FunctionDef):
                told = len((ast.get_docstring(node) or "").splitlines())  # what it says of itself does not count
                assert node.end_lineno - node.lineno + 1 - told <= 60, f"{node.name} in {path}"


def test_study_benchmarks_and_tests_stand_above_the_package():
    """Nothing that is installed needs what is not."""
    for f in [*FILES, *(ROOT / "tools").glob("*.py")]:
        assert not packages(f) & {"lab", "benchmarks", "tests"}, f
    for f in (ROOT / "lab").glob("*.py"):
        assert not packages(f) & {"benchmarks", "tests"}, f


def packages(path: Path) -> set[str]:
    """Top-level names that a file imports, also inside functions."""
    nodes = list(ast.walk(parse(path.read_text())))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    return {name.split(".")[0] for name in [*names, *(n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module)]}


WORDS = re.compile(r"flux|unet|sd3|\bt5\b|pooled|guidance_embeds|sd15|sdxl|sd_xl|['\"]transformer\.", re.IGNORECASE)
"""Of single families of models, in any case."""
ALLOWED = {
    "recipe/foreign.py": "keys of other trainers",
    "adapters/programs.py": "what other programs look for in adapter files",
    "adapters/formats.py": "the same",
    "adapters/naming.py": "the same, and where pipelines keep denoisers",
    "models/registry.py": "the line by which the package's own families are found",
    "models/words.py": "its vector of a whole caption",
    "recipe/model_tables.py": "keys of recipes and their descriptions",
    "recipe/schema.py": "the same",
}
PLACES = re.compile(
    r"LibreFLUX|dedistill:flux\w*|flux_schnell_24gb|FLUX\.1-schnell|FLUX\.1-dev's shift|diffusers' FLUX pipeline|SDXL's 15"
)
"""Where a formula is from, and names in examples for the reader."""


def test_a_models_words_stay_in_its_folder():
    found = {}
    for f in FILES:
        inside = f.relative_to(PACKAGE)
        if inside.parts[0] == "models" and len(inside.parts) > 2:
            continue
        if words := WORDS.findall(PLACES.sub("", f.read_text())):
            found[str(inside)] = words
    assert found.keys() == ALLOWED.keys(), found


def test_only_the_registry_names_a_family():
    from dedistill.models.registry import OWN

    for f in FILES:
        inside = f.relative_to(PACKAGE)
        if (inside.parts[0] == "models" and len(inside.parts) > 2) or str(inside) == "models/registry.py":
            continue
        assert not [name for name in OWN if f'"{name}"' in f.read_text()], f


def test_files_that_are_called_long_are_there():
    assert not [name for name in LONG if not (ROOT / "tests" / f"{name}.py").exists()]


def test_light_packages_stay_light():
    """The package itself, recipes, and the door to sampling."""
    heavy = "[m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'accelerate', 'peft') if m in sys.modules]"
    code = f"import sys, dedistill, dedistill.sampling, dedistill.recipe, dedistill.recipe.resolve; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_pickle_no_torchvision_no_remote_code():
    """Nothing that can bring code: each loader of the libraries is told to run none."""
    shipped = [*FILES, *(ROOT / "tools").glob("*.py"), *(ROOT / "lab").glob("*.py")]
    for f in shipped:
        for word in ("import pickle", "torch.load(", "torchvision", "extractall"):
            assert word not in f.read_text(), f"{word} in {f}"
    for f in [*shipped, *(ROOT / "benchmarks").rglob("*.py")]:
        text = f.read_text()
        calls = [node for node in ast.walk(parse(text)) if isinstance(node, ast.Call)]
        loaders = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "from_pretrained"]
        told = [k for c in loaders for k in c.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) == "False"]
        assert len(told) == len(loaders) and text.count("trust_remote_code") == len(told), f"a loader in {f} may run code"
