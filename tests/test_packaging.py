"""The distribution: every folder with code is packaged, and no folder shadows a real package."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def test_every_folder_with_code_is_packaged() -> None:
    with_code = {
        "moescope." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ("app", "kernels", "probe", "steering")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert with_code <= set(PACKAGES), "name the new folder in pyproject.toml"
    folders = {ROOT.joinpath(*name.split(".")[1:]) for name in PACKAGES}
    assert all(folder.is_dir() for folder in folders)


def test_no_folder_shadows_the_packages_of_the_same_name() -> None:
    for name in ("datasets", "kernels", "tests", "tests/kernels", "tests/app"):
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/ must not be a package"


def test_the_real_packages_are_imported_from_the_repository_root() -> None:
    code = (
        "import transformers, transformer_lens, datasets; "
        "print(datasets.__file__, datasets.Dataset.__name__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "site-packages" in found.stdout and "Dataset" in found.stdout


def test_data_files_are_found_by_path() -> None:
    import moescope.probe
    from moescope.probe.shipped import DATASETS

    assert moescope.probe.__file__ is not None
    assert Path(moescope.probe.__file__).resolve().parent.parent / "datasets" == DATASETS
    assert (DATASETS / "prompts").is_dir()


def test_dependencies_have_a_constraint_each() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["dev"],
    ]
    names = {re.split(r"[\[>=]", text)[0].lower() for text in wanted}
    assert names - pinned == {"torch"}, "torch is the Makefile's TORCH; all else is constrained"
