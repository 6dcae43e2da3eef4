"""The package as such: cheap to import, complete as a wheel, and layered the way it is drawn."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import pytest

import fusedmoe

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "fusedmoe"
MODULES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("triton", "transformers", "tokenizers", "matplotlib", "tqdm")
# About 300 is the aim; a long table or a long argument list may pass it, another idea may not.
# Device code may be longer: one kernel's phases share registers, not functions.
MAX_LINES, MAX_DEVICE_LINES = 360, 400


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that sees this source tree first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment,
        timeout=120,
    )


def test_importing_brings_in_nothing_heavy() -> None:
    done = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import time; start = time.perf_counter()\n"
        "import fusedmoe\n"
        "seconds = time.perf_counter() - start\n"
        f"heavy = [name for name in {HEAVY} if name in set(sys.modules) - before]\n"
        "assert not heavy, heavy\n"
        "assert seconds < 0.3, seconds\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_layer_is_built_and_run_without_the_compiler_and_triton() -> None:
    """Both take longer to import than all of this library."""
    done = python(
        "import sys, torch\n"
        "from fusedmoe import FusedMoE, explain\n"
        "layer = FusedMoE(4, 2, 16, 8, params_dtype=torch.float32)\n"
        "explain(layer)\n"
        "layer(torch.randn(3, 16), torch.randn(3, 4))\n"
        "heavy = {'torch._dynamo', 'sympy', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_touches_no_device() -> None:
    done = python(
        "import torch, fusedmoe\n"
        "[getattr(fusedmoe, name) for name in fusedmoe.__all__ if name not in ('register',)]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr


# None in sys.modules is how Python itself spells "this cannot be imported".
BLOCKER = "import sys\nsys.modules.update(dict.fromkeys({names!r}))\n"


def test_the_library_works_without_triton_and_transformers() -> None:
    """Every public name resolves, and experts run, with only torch and safetensors there."""
    done = python(
        BLOCKER.format(names=(*HEAVY, "numpy")) + "import torch, fusedmoe\n"
        "for name in fusedmoe.__all__:\n"
        "    getattr(fusedmoe, name)\n"
        "from fusedmoe.kernels.experts_reference import experts_reference\n"
        "x, w1, w2 = torch.ones(2, 4), torch.ones(3, 6, 4), torch.ones(3, 4, 3)\n"
        "ids, weights = torch.tensor([[0, 2], [1, -1]]), torch.full((2, 2), 0.5)\n"
        "assert experts_reference(x, w1, w2, weights, ids).isfinite().all()\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["env", "inspect", "explain"])
def test_describing_needs_no_extras(verb: str, tmp_path: Path) -> None:
    """The verbs that only describe run without Transformers, Triton, tqdm or numpy."""
    from safetensors.torch import save_file

    torch = pytest.importorskip("torch")
    experts = "model.layers.0.block_sparse_moe.experts"
    save_file(
        {
            f"{experts}.{e}.{name}.weight": torch.zeros(shape)
            for e in range(2)
            for name, shape in (("w1", (8, 4)), ("w3", (8, 4)), ("w2", (4, 8)))
        },
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(
        '{"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1,'
        ' "hidden_size": 4, "intermediate_size": 8, "hidden_act": "silu"}'
    )
    argv = [verb, "--json"] if verb == "env" else [verb, str(tmp_path), "--json"]
    done = python(
        BLOCKER.format(names=(*HEAVY, "numpy"))
        + f"from fusedmoe.cli import main\nraise SystemExit(main({argv!r}))\n"
    )
    assert done.returncode == 0, done.stderr


def test_generate_without_transformers_says_what_to_install() -> None:
    done = python(
        BLOCKER.format(names=("transformers",)) + "from fusedmoe.cli import main\n"
        "raise SystemExit(main(['generate', '--preset', 'tiny-mixtral']))\n"
    )
    assert done.returncode == 2
    assert "fusedmoe[hf]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_public_name_resolves() -> None:
    assert len(set(fusedmoe.__all__)) == len(fusedmoe.__all__)
    for name in fusedmoe.__all__:
        assert getattr(fusedmoe, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fusedmoe.nonsense  # noqa: B018


def test_base_dependencies_are_torch_and_safetensors() -> None:
    base = [line for line in requires("fusedmoe") or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0].strip() for line in base) == ["safetensors", "torch"]


def make_venv() -> Any:
    """tools/make_venv.py as a module."""
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / "tools" / "make_venv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_installed_torch_is_kept_and_a_missing_one_is_pinned() -> None:
    tool = make_venv()
    pinned = (ROOT / "constraints.txt").read_text()
    assert tool.constraints(keep=False) == pinned
    assert re.search(r"^torch==2\.13\.0$", pinned, re.MULTILINE)
    kept = tool.constraints(keep=True)
    assert f"torch=={version('torch')}\n" in kept
    assert "torch==2.13.0\n" not in kept or version("torch") == "2.13.0"
    assert re.search(r"^transformers==", kept, re.MULTILINE)


@pytest.mark.parametrize(
    ("found", "kept"),
    [("2.11.0+cu130", True), ("3.0", True), ("2.10.1", False), ("1.13.1", False), (None, False)],
)
def test_only_a_torch_that_is_new_enough_is_kept(
    found: str | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = make_venv()

    def version_of(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(tool, "version", version_of)
    assert tool.installed_torch() == (found if kept else None)


def test_the_wheel_is_pure_python_and_complete(tmp_path: Path) -> None:
    hatchling = pytest.importorskip("hatchling.build")
    here = os.getcwd()
    try:
        os.chdir(ROOT)
        name = hatchling.build_wheel(str(tmp_path))
    finally:
        os.chdir(here)
    assert name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(tmp_path / name) as wheel:
        files = set(wheel.namelist())
    assert "fusedmoe/py.typed" in files
    assert not [f for f in files if f.endswith((".so", ".pyc", ".pyd", ".o", ".cubin"))]
    packed = {f"fusedmoe/{path.relative_to(SOURCE).as_posix()}" for path in MODULES}
    assert packed <= files
    tables = {f"fusedmoe/{path.relative_to(SOURCE).as_posix()}" for path in SOURCE.rglob("*.json")}
    assert tables
    assert tables <= files
    assert any(f.endswith("licenses/LICENSE") for f in files)
    assert not [f for f in files if f.startswith("tests/")]


def test_files_stay_short() -> None:
    lengths = {
        path.relative_to(SOURCE).as_posix(): len(path.read_text().splitlines()) for path in MODULES
    }

    def limit(name: str) -> int:
        return MAX_DEVICE_LINES if name.startswith("kernels/triton/") else MAX_LINES

    assert not {name: count for name, count in lengths.items() if count > limit(name)}


# What every stage may read although it lives in a later one's room: records.
CONTRACT = {"router.spec", "quantization.keys", "quantization.config"}
# Who may not be imported by whom. A stage imports the contract and the kernels, never a later
# stage; device code knows nothing of the layer; nothing in the library knows the command line.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "kernels": (
        *("experts", "prepare_finalize", "router", "runner", "layer", "selection"),
        *("modular_kernel", "weights", "integrations", "cli"),
    ),
    "router": ("experts", "prepare_finalize", "runner", "layer", "integrations", "cli"),
    "distributed": (
        *("experts", "prepare_finalize", "router", "runner", "layer", "selection"),
        *("modular_kernel", "weights", "integrations", "cli"),
    ),
    "eplb": ("experts", "prepare_finalize", "router", "runner", "layer", "integrations", "cli"),
    "prepare_finalize": ("experts", "router", "runner", "layer", "integrations", "cli"),
    "experts": ("prepare_finalize", "runner", "layer", "integrations", "cli"),
    "quantization": ("runner", "layer", "integrations", "cli"),
    "weights": ("runner", "layer", "integrations", "cli"),
    "runner": ("layer", "integrations", "cli"),
    "modular_kernel": ("experts", "prepare_finalize", "router", "runner", "layer", "cli"),
    "config": ("modular_kernel", "selection", "experts", "router", "runner", "layer", "cli"),
    "parallel_config": ("config", "modular_kernel", "selection", "router", "runner", "layer"),
    "layer": ("integrations", "cli"),
    "integrations": ("cli",),
    "testing": ("cli", "runner", "layer"),
    "bench": ("cli",),
}


def imports_of(path: Path) -> set[str]:
    """The rooms under ``fusedmoe`` that a file imports from, for typing and contract left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *path = name.split(".")
            if package == "fusedmoe" and path and ".".join(path[:2]) not in CONTRACT:
                found.add(path[0])
    return found


@pytest.mark.parametrize("part", FORBIDDEN)
def test_no_stage_imports_a_later_one(part: str) -> None:
    wrong = {
        path.relative_to(SOURCE).as_posix(): sorted(imports_of(path) & set(FORBIDDEN[part]))
        for path in MODULES
        if path.relative_to(SOURCE).parts[0] in (part, f"{part}.py")
    }
    assert not {name: parts for name, parts in wrong.items() if parts}


def test_triton_bodies_are_imported_by_launchers_only() -> None:
    """``import triton`` at module level stands under kernels/ in files named for it alone."""
    wrong = []
    for path in MODULES:
        relative = path.relative_to(SOURCE)
        top = [
            alias.name if isinstance(node, ast.Import) else node.module or ""
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        uses_triton = any(name.partition(".")[0] in ("triton", "transformers") for name in top)
        if uses_triton and relative.parts[:2] != ("kernels", "triton"):
            wrong.append(relative.as_posix())
    assert not wrong


# The test extra's packages of weight formats, which a GPU machine need not have.
FORMAT_PACKAGES = {"compressed_tensors", "gguf", "torchao"}


def test_packages_of_formats_are_imported_where_they_are_used() -> None:
    """At module level an import would keep the file's GPU tests from being collected without it."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.partition(".")[0] for name in names} & FORMAT_PACKAGES:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong
