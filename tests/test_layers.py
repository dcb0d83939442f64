"""The house rules that can be executed: import layers, file and function sizes, clean names."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torchrec_cafe"
#: what each layer may import from the package
LAYERS = {
    "_library": set(),
    "config": {"config"},
    "ops": {"ops"},
    "tables": {"config", "ops", "tables"},
    "serving": {"config", "ops", "tables", "serving"},
    "distributed": {"config", "ops", "tables", "serving", "distributed"},
    "planning": {"config", "distributed", "planning"},
    "profile": {"config", "ops", "planning", "profile"},
    "cli": {"planning", "profile"},
}
#: third-party packages that only the given layers may import
OWNERS = {
    "torchrec": {"serving", "distributed", "planning"},
    "torchrec.distributed": {"distributed"},
    "fbgemm_gpu": {"tables", "distributed"},
    "torch": {"_library", "ops", "tables", "serving", "distributed", "planning", "profile"},
    "matplotlib": {"profile"},
    "pyarrow": {"profile"},
    "yaml": {"planning", "profile"},
}
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_PYTHON = sorted(
    path
    for folder in ("torchrec_cafe", "tests", "examples", "benchmarks", "torchx_components")
    for path in (ROOT / folder).rglob("*.py")
)


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_up_only(path):
    layer = layer_of(path)
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "torchrec_cafe" and layer != "__init__":
            assert rest[0] in LAYERS[layer], f"{layer} imports {name}"
        for owned, owners in OWNERS.items():
            if f"{name}.".startswith(f"{owned}.") and layer != "__init__":
                assert layer in owners, f"{layer} imports {name}"


def test_only_the_contact_files_use_private_upstream_names():
    for path in SOURCES:
        if path.name in ("_torchrec.py", "_fbgemm.py"):
            continue
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] in ("torchrec", "fbgemm_gpu"):
                assert not any(part.startswith("_") for part in parts), f"{path}: {name}"


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            documented = ast.get_docstring(node, clean=False)
            length -= documented.count("\n") + 1 if documented else 0
            assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_native_files_are_short():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert path.read_text().count("\n") <= 400, path


def test_algorithm_headers_are_free_of_torch():
    for name in (
        "hash.h",
        "bucket.h",
        "bucket_avx2.h",
        "hot_sketch.h",
        "row_map.h",
        "cpu/kernels.h",
    ):
        assert "torch/" not in (ROOT / "csrc" / name).read_text(), name
