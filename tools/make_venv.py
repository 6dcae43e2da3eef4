"""Make .venv for this checkout, keeping a torch that is already installed.

    python3 tools/make_venv.py        makes .venv and .venv/constraints.txt

If the Python that runs this has a new enough torch (a CUDA build, say), .venv sees that Python's
packages and the constraints name that very torch and its triton, so that pip leaves them alone.
Otherwise .venv is empty and the constraints are those of constraints.txt. Standard library only.
"""

from __future__ import annotations

import contextlib
import re
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
KEPT = ("torch", "triton")


def installed_torch() -> str | None:
    """The version of the torch that this Python would import, if it is new enough."""
    try:
        found = version("torch")
    except PackageNotFoundError:
        return None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST_TORCH:
        print(f"torch {found} is too old to be used")
        return None
    return found


def constraints(keep: bool) -> str:
    """constraints.txt; with ``keep``, torch and triton at the versions that are there."""
    lines = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name = line.partition("==")[0]
        if keep and name in KEPT:
            with contextlib.suppress(PackageNotFoundError):
                line = f"{name}=={version(name)}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def make(folder: Path) -> None:
    if Path(sys.prefix).resolve() == folder.resolve():
        return  # This Python is the one of that .venv.
    torch_version = installed_torch()
    keep = torch_version is not None
    venv.create(folder, with_pip=True, system_site_packages=keep, symlinks=sys.platform != "win32")
    if keep and sys.prefix != sys.base_prefix:
        # A venv made from a venv sees the base Python's packages only; this adds the venv's own.
        paths = {"base": str(folder), "platbase": str(folder)}
        target = Path(sysconfig.get_path("purelib", vars=paths))
        (target / "outer-environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "constraints.txt").write_text(constraints(keep))
    print(f"{folder}: {f'keeps torch {torch_version}' if keep else 'a new environment'}")


if __name__ == "__main__":
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"fusedmoe needs Python 3.11 or later; this is {sys.version.split()[0]}")
    make(ROOT / ".venv")
