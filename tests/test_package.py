"""The package as a whole: what importing it costs, what it exports and says of itself, what is installed."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pab_kernels

PACKAGE = Path(pab_kernels.__file__).parent
ROOT = Path(__file__).parents[1]

PUBLIC = {
    "calibrate",
    "fit",
    "enable",
    "disable",
    "release",
    "generation",
    "context",
    "sublayers",
    "plan",
    "summary",
    "Broadcast",
    "PABConfig",
    "Plan",
} | {
    "patch_diffusers",
    "unpatch_diffusers",
    "parallelize",
    "unparallelize",
}

OPTIONAL = (
    "accelerate",
    "bs4",
    "diffusers",
    "ftfy",
    "huggingface_hub",
    "imageio",
    "imageio_ffmpeg",
    "matplotlib",
    "PIL",
    "rich",
    "safetensors",
    "skimage",
    "tqdm",
    "transformers",
    "typer",
    "yaml",
)
"""What the package uses and does not need for `import pab_kernels`."""

ROOMS = (
    "extras",
    "messages",
    "progress",
    "compat",
    "strict_json",
    "files",
    "figures",
    "streams",
    "limits",
    "ops",
    "rules",
    "broadcast",
    "nn",
    "models",
    "adapters",
    "parallel",
    "api",
    "patch",
    "analysis",
)
"""From the bottom to the top: a room imports itself and what is to its left. Others, such as `demo` and `doctor`, stand
above all of them."""

ABOVE = ("demo_ranks", "cli", "__main__")
"""What stands above these again, from the bottom to the top."""

MAX_LINES = 450

COMPILED = ("*.so", "_build_info.json")
"""What a build of the CUDA kernels leaves in the source tree; it is in no wheel but those that it is compiled for."""


def _modules() -> list[str]:
    paths = sorted(p.relative_to(PACKAGE.parent).with_suffix("") for p in PACKAGE.rglob("*.py"))
    return [".".join(p.parts).removesuffix(".__init__") for p in paths]


def _source(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name in ("triton", "flash_attn"):
            pytest.skip(f"{error.name} is not installed")
        raise


def _fresh_interpreter(code: str, folder: Path) -> dict[str, list[str]]:
    """Run `code` in an interpreter of its own; it fills the dict `seen`, which is returned."""
    code = f"import json, sys\nseen = {{}}\n{code}\nprint(json.dumps(seen))"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Importing


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is loaded by `import pab_kernels`, and by its public names, where no optional package is installed."""
    code = f"""
import torch
torch_alone = set(sys.modules)
for name in {OPTIONAL}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import pab_kernels
seen["new"] = sorted(name for name in set(sys.modules) - torch_alone if sys.modules[name] is not None)
for name in pab_kernels.__all__:
    if name not in ("calibrate", "fit"):
        getattr(pab_kernels, name)
seen["ours"] = sorted(name for name in sys.modules if name.startswith("pab_kernels"))
pab_kernels.calibrate, pab_kernels.fit
compilers = {{"torch._dynamo", "torch._inductor"}} - torch_alone
seen["compilers"] = [name for name in compilers if name in sys.modules]
"""
    return _fresh_interpreter(code, tmp_path_factory.mktemp("elsewhere"))


def test_import_loads_the_package_file_alone(imported: dict[str, list[str]]) -> None:
    third_party = {name.partition(".")[0] for name in imported["new"]} - set(sys.stdlib_module_names)
    assert third_party == {"pab_kernels"}
    assert [name for name in imported["new"] if name.startswith("pab_kernels")] == ["pab_kernels"]


def test_every_public_name_needs_torch_alone(imported: dict[str, list[str]]) -> None:
    assert imported["compilers"] == [], "these take longer to import than torch itself"
    unneeded = (
        "pab_kernels.models",
        "pab_kernels.analysis",
        "pab_kernels.cli",
        "pab_kernels.demo",
        "pab_kernels.doctor",
    )
    assert [name for name in imported["ours"] if name.startswith(unneeded) or name.endswith((".triton", ".cuda"))] == []


def test_rules_are_imported_without_torch(tmp_path: Path) -> None:
    rules = [module for module in _modules() if module.startswith("pab_kernels.rules")]
    code = f"""
import importlib
sys.modules["torch"] = None
seen["rules"] = [importlib.import_module(name).__name__ for name in {rules}]
"""
    assert len(rules) > 5 and _fresh_interpreter(code, tmp_path)["rules"] == rules


# Names


def test_public_names_are_the_documented_ones_and_resolve() -> None:
    assert set(pab_kernels.__all__) == PUBLIC
    for name in pab_kernels.__all__:
        assert getattr(pab_kernels, name).__module__.startswith("pab_kernels."), name
    assert set(dir(pab_kernels)) >= PUBLIC


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        pab_kernels.no_such_name  # noqa: B018


def test_version_is_that_of_the_installed_distribution() -> None:
    try:
        installed = importlib.metadata.version("pab-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is imported from its folder, not installed")
    assert pab_kernels.__version__ == installed


# Documentation in the code


@pytest.mark.parametrize("module", _modules())
def test_modules_and_what_they_export_have_docstrings(module: str) -> None:
    text = _source(module).read_text()
    assert not text or ast.get_docstring(ast.parse(text)), f"{module} does not say what it is"
    loaded = _import(module)
    for name in getattr(loaded, "__all__", ()):
        exported = getattr(loaded, name)
        if inspect.isroutine(exported) or inspect.isclass(exported):
            assert exported.__doc__, f"{module}.{name} has no docstring"
        if inspect.isclass(exported) and exported.__module__.startswith("pab_kernels"):
            undocumented = [n for n, member in _methods(exported) if not inspect.getdoc(member)]
            assert undocumented == [], f"{module}.{name} has methods without docstrings"


def _methods(cls: type) -> Iterator[tuple[str, object]]:
    for name, member in vars(cls).items():
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            yield name, member


@pytest.mark.parametrize("module", [m for m in _modules() if ">>>" in _source(m).read_text()])
def test_docstring_examples_run(module: str) -> None:
    results = doctest.testmod(_import(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


# Structure


@pytest.mark.parametrize("module", [m for m in _modules() if "." in m])
def test_imports_point_downwards(module: str) -> None:
    own = module.split(".")[1]
    package = module if _source(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(_source(module).read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        target = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        targets = [f"{target}.{alias.name}" for alias in node.names] if target == "pab_kernels" else [target]
        for room in (name.split(".")[1] for name in targets if name.startswith("pab_kernels.")):
            assert room == own or _height(room) < _height(own), f"{module}, line {node.lineno}: imports {room}"


def _height(room: str) -> int:
    return [*ROOMS, *ABOVE].index(room) + (room in ABOVE) if room in (*ROOMS, *ABOVE) else len(ROOMS)


def test_files_stay_short() -> None:
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}, (
        f"a file holds one idea, in at most {MAX_LINES} lines"
    )


# What is installed


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names of the files in a wheel and in an sdist built from a copy of the tree."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the sources of the distribution are not here")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in ("pab_kernels", "csrc", "python", "cmake"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", *COMPILED))
    code = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    env = {**os.environ, "PAB_BUILD_CUDA": "0"}  # with kernels: tests/csrc/test_wheel.py
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name.endswith("-py3-none-any.whl") for path in out.glob("*.whl")] == [True]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as w, tarfile.open(sdist) as s:
        return set(w.namelist()), {name.partition("/")[2] for name in s.getnames()}


def test_wheel_and_sdist_hold_every_file_of_the_package(distributions: tuple[set[str], set[str]]) -> None:
    wheel, sdist = distributions
    sources = [p for p in (ROOT / "pab_kernels").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    files = {p.relative_to(ROOT).as_posix() for p in sources if not any(map(p.match, COMPILED))}
    assert files >= {
        "pab_kernels/py.typed",
        "pab_kernels/models/demo/weights.safetensors",
        "pab_kernels/models/demo/README.md",
        "pab_kernels/models/video/weights.safetensors",
        "pab_kernels/models/video/README.md",
    }
    assert files - wheel == set()
    assert files - sdist == set()
    kernels = {
        p.relative_to(ROOT).as_posix()
        for folder in ("csrc", "python", "cmake")
        for p in (ROOT / folder).rglob("*")
        if p.is_file()
    }
    assert {*kernels, "CMakeLists.txt"} - sdist == set() and kernels & wheel == set()
    assert "pab_kernels/_build_info.json" in wheel


def test_wheel_has_the_command_and_the_licence_and_no_tests(distributions: tuple[set[str], set[str]]) -> None:
    wheel, _ = distributions
    assert {name.rpartition("/")[2] for name in wheel if ".dist-info/" in name} >= {
        "entry_points.txt",
        "LICENSE",
        "METADATA",
    }
    assert {name.partition("/")[0].partition("-")[0] for name in wheel} == {"pab_kernels"}
