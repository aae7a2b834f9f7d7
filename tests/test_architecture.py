"""Rules of the code base that a reader would otherwise have to remember."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ctxfast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ctxfast"

# Each layer and the layers of ctxfast it may import; "" is the top level's own small modules.
ALLOWED = {
    "kernels": {"kernels"},
    "reference": {"reference"},
    "ops": {"ops", "reference", "kernels", "packed"},
    "packed": set(),
    "nn": {"nn", "ops", "reference", "packed"},
    "bert": {"bert", "nn", "ops", "reference", "packed"},
    "elmo": {"elmo", "bert", "nn", "ops", "reference", "packed"},
    "embeddings": {"embeddings", "bert", "elmo", "nn", "ops", "packed"},
    "explanation": {"ops"},
    "integrations": {"integrations", "bert", "elmo", "nn", "ops", "packed"},
    "info": {"ops"},
    "demo": {"bert", "elmo", "ops", "packed", "info", "examples"},
    "demo_elmo": {"elmo", "ops", "examples"},
    "examples": {"examples", "demo", "bert", "elmo", "nn", "ops", "embeddings", "packed"},
    "cli": {
        "cli",
        "demo_elmo",
        "benchmarks",
        "bert",
        "elmo",
        "embeddings",
        "info",
        "demo",
        "ops",
        "explanation",
    },
    "benchmarks": {"benchmarks", "bert", "elmo", "nn", "ops", "reference", "packed", "explanation"},
}


def sources(folder: Path, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """Files that git tracks or would track, links left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        files = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        files = [f for f in folder.rglob("*") if ".venv" not in f.parts and "build" not in f.parts]
    return [f for f in files if f.suffix in suffixes and f.is_file() and not f.is_symlink()]


def imports(path: Path) -> set[str]:
    """Absolute names of every module that a file imports, relative imports resolved."""
    module = list(path.relative_to(ROOT).with_suffix("").parts)
    if module[0] in ("kernels", "benchmarks"):
        module.insert(0, "ctxfast")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.add(origin)
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> str | None:
    """The layer of ctxfast that a module name belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "ctxfast" and parts[1] in ALLOWED else None


def layer_files() -> list[tuple[str, Path]]:
    files = [(f.relative_to(PACKAGE).parts[0].removesuffix(".py"), f) for f in sources(PACKAGE)]
    files += [(name, f) for name in ("kernels", "benchmarks") for f in sources(ROOT / name)]
    return [(name, f) for name, f in files if name not in ("__init__", "__main__")]


def test_imports_point_in_one_direction():
    wrong = []
    for name, path in layer_files():
        assert name in ALLOWED, f"{path}: a new layer needs a line in ALLOWED"
        used = {layer(i) for i in imports(path)} - {None}
        wrong += [f"{path.relative_to(ROOT)} imports {u}" for u in used - ALLOWED[name] - {name}]
    assert not wrong, wrong


def test_reference_imports_torch_only_and_kernels_triton_only():
    for path in sources(PACKAGE / "reference"):
        roots = {i.split(".")[0] for i in imports(path)} - sys.stdlib_module_names
        assert roots <= {"torch", "ctxfast"}, path
    for path in sources(ROOT / "kernels"):
        roots = {i.split(".")[0] for i in imports(path) if layer(i) != "kernels"}
        assert roots - {"ctxfast"} - sys.stdlib_module_names <= {"triton"}, path


def test_nobody_imports_tests_or_a_top_level_kernels():
    for path in [*sources(PACKAGE), *sources(ROOT / "kernels"), *sources(ROOT / "benchmarks")]:
        roots = {i.split(".")[0] for i in imports(path)}
        assert not roots & {"tests", "kernels", "benchmarks"}, path
    for path in sources(ROOT / "tests"):
        assert not {i.split(".")[0] for i in imports(path)} & {"kernels", "benchmarks"}, path


def test_only_the_boundary_touches_raw_pointers():
    for path in [*sources(PACKAGE), *sources(ROOT / "benchmarks")]:
        if path.name == "_native.py" or path.name.startswith("_native_"):
            continue
        text = path.read_text()
        if path.name != "packed_copy.py":  # a packed weight remembers where its original lay
            assert "data_ptr()" not in text, path
        assert not re.search(r"import ctxfast\._C|import _C", text), path


def test_csrc_knows_nothing_of_torch():
    for path in sources(ROOT / "csrc", (".cpp", ".h", ".cu", ".cuh")):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path
        if not path.name.startswith("bindings"):
            assert "pybind11" not in path.read_text(), path


def test_files_can_be_read_in_one_sitting():
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh")
    long = {
        str(f.relative_to(ROOT)): count
        for f in sources(ROOT, suffixes)
        if (count := len(f.read_text().splitlines())) > 400
    }
    assert not long, long


def test_public_names():
    assert set(ctxfast.__all__) <= set(dir(ctxfast))
    for name in ctxfast.__all__:
        assert getattr(ctxfast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ctxfast.nothing


OPTIONAL = ("triton", "transformers", "h5py", "tokenizers", "typer", "onnxruntime", "ctxfast._C")


def test_import_without_anything_optional():
    """A fresh interpreter in which the optional modules cannot be imported runs an operator on the reference."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {OPTIONAL!r} or name.split(".")[0] in {OPTIONAL!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import torch, ctxfast
x = torch.randn(1, 2, 3, 4)
result = ctxfast.ops.attention(x, x, x)
expected = torch.nn.functional.scaled_dot_product_attention(x, x, x)
torch.testing.assert_close(result, expected)
assert ctxfast.explain(ctxfast.ops.attention, x, x, x).ran("attention") == {{"reference"}}
import ctxfast.bert, ctxfast.elmo, ctxfast.nn
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_import_is_quick():
    """Over `import torch`, `import ctxfast` loads next to nothing."""
    code = """
import torch, time
start = time.perf_counter()
import ctxfast
assert "numpy.testing" not in __import__("sys").modules
print(time.perf_counter() - start)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert float(run.stdout) < 0.3, run.stdout + run.stderr


def test_repository_speaks_of_the_software_alone():
    pattern = re.compile(r"(^|[^\w./-])/(work|farm)/|pypi\.org|pythonhosted|npmjs", re.MULTILINE)
    for path in sources(ROOT, (".py", ".md", ".toml", ".txt", ".cpp", ".h", ".cu", ".cuh", "")):
        if path != Path(__file__).resolve():
            assert not pattern.search(path.read_text()), path
