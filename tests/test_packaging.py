"""What is installed: the wheel holds the package alone, and every package that is imported is declared and pinned."""

from __future__ import annotations

import ast
import importlib
import logging
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, assert_one_line_error, run_script
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: [*map(Requirement, lines)] for name, lines in PROJECT["optional-dependencies"].items()}
CALLED = {"PIL": "pillow", "markdown_it": "markdown-it-py", "yaml": "pyyaml"}  # import name → distribution
UNPINNED = {"setuptools"}  # builds the wheel, comes with torch: any version that torch takes


def distribution(name: str) -> str:
    """A distribution's name as one spelling, from its own or from the name by which it is imported."""
    return CALLED.get(name, name).replace("_", "-").lower()


def declared(*extras: str) -> set[str]:
    """The distributions that an install with these extras asks for by name."""
    found, left = {distribution(Requirement(line).name) for line in PROJECT["dependencies"]}, list(extras)
    while left:
        for requirement in EXTRAS[left.pop()]:
            if requirement.name == PROJECT["name"]:
                left += requirement.extras
            found.add(distribution(requirement.name))
    return found - {PROJECT["name"]}


def pins() -> list[tuple[str, Requirement, str]]:
    """(file, pinned requirement, reason) of each line of the two lock files."""
    lines = [(file, line) for file in ("requirements.txt", "constraints.txt") for line in (ROOT / file).open()]
    parts = [(file, *line.partition("#")) for file, line in lines if line.strip() and not line.startswith("#")]
    return [(file, Requirement(pin), reason.strip()) for file, pin, _, reason in parts]


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        found |= {name.partition(".")[0] for name in names}
    return found


@pytest.mark.parametrize("where", ["the package and the scripts", "tests and benchmarks"])
def test_every_imported_package_is_declared(where):
    if where == "tests and benchmarks":
        files, allowed = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")], declared(*EXTRAS)
    else:
        files = [*ROOT.glob("alpaca/**/*.py"), *ROOT.glob("*.py"), *ROOT.glob("runs/*.py")]
        allowed = declared(*EXTRAS.keys() - {"test", "bench"})
    ours = {
        "alpaca",
        "runs",
        *(path.stem for folder in (".", "tests/**", "benchmarks") for path in ROOT.glob(f"{folder}/*.py")),
    }
    for path in files:
        names = imported(path) - ours - sys.stdlib_module_names
        missing = {name for name in names if distribution(name) not in allowed}
        assert not missing, f"{path.relative_to(ROOT)} imports {missing}, which pyproject.toml does not declare"


def test_every_dependency_is_pinned_once_within_its_range_and_says_who_uses_it():
    pinned = {distribution(pin.name): pin for _, pin, _ in pins()}
    assert len(pinned) == len(pins())
    for _, pin, reason in pins():
        assert str(pin.specifier).startswith("==") and len(reason) > 10, f"{pin}: {reason}"
    core = {distribution(pin.name) for file, pin, _ in pins() if file == "requirements.txt"}
    assert core == declared() and set(pinned) == declared(*EXTRAS) - UNPINNED
    for line in PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), []):
        wanted = Requirement(line)
        for specifier in getattr(pinned.get(distribution(wanted.name)), "specifier", ()):
            assert specifier.version in wanted.specifier, f"{wanted} leaves out the pinned version"


def test_every_extra_that_a_message_or_document_names_exists():
    files = [*ROOT.glob("alpaca/**/*.py"), *ROOT.glob("*.py"), ROOT / "README.md", *ROOT.glob("docs/*.md")]
    named = {extra for path in files for extra in re.findall(r"(?:\.|reproduced)\[([a-z-]+)\]'", path.read_text())}
    assert {"web", "plots", "lora"} <= named <= EXTRAS.keys()


def test_ci_runs_make_test_on_every_python_that_is_promised_and_on_no_other():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if " :: Python :: 3." in line]
    assert job["strategy"]["matrix"]["python-version"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert "make test" in [step.get("run") for step in job["steps"]]


def test_the_image_is_installed_by_the_makefile():
    built = re.findall(r"^RUN make (\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert built == [".venv/installed"] and "\n$(VENV)/installed: " in (ROOT / "Makefile").read_text()


def test_every_path_and_name_in_contributing_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    words = re.findall(r"`([^`\s]+)`", text) + re.findall(r"\]\((\S+)\)", text)
    paths = [word for word in words if re.search(r"[a-z]/|\.(py|md|toml|txt)$", word) and "ROOM" not in word]
    assert len(paths) > 15 and not [path for path in paths if not (ROOT / path).exists()]
    names = {word for word in words if re.fullmatch(r"[a-z]+_\w+|[A-Z]+_?[A-Z]+|[A-Z][a-z]+", word)} - {"DATA_LICENSE"}
    code = "\n".join((ROOT / path).read_text() for path in paths if path.endswith(".py"))
    defined = {name for found in re.findall(r"(?:def|class) (\w+)|^(\w+) =", code, re.M) for name in found}
    assert len(names) > 10 and names <= defined, names - defined


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built in a copy of what goes into it: a build leaves folders beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "alpaca", folder / "src" / "alpaca", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [ROOT / "pyproject.toml", ROOT / "README.md", *ROOT.glob("*LICENSE"), *ROOT.glob("*.py")]:
        shutil.copy(path, folder / "src")
    command = "pip wheel --quiet --no-deps --no-index --no-build-isolation --wheel-dir"
    subprocess.run([sys.executable, "-m", *command.split(), folder, folder / "src"], check=True, timeout=120)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [path for path in ROOT.glob("alpaca/**/*") if path.is_file() and "__pycache__" not in path.parts]
    assert held == {path.relative_to(ROOT).as_posix() for path in files}


def test_every_installed_module_can_be_imported_beside_a_users_own_utils_and_on_windows(wheel, tmp_path):
    """What Windows lacks is taken away once the libraries, which know their way, have been loaded."""
    wheel.extractall(tmp_path / "site")
    (tmp_path / "here").mkdir()
    for script in ROOT.glob("*.py"):
        (tmp_path / "here" / script.name).write_text("raise SystemExit('a module of the user was imported')\n")
    modules = [name for name in wheel.namelist() if name.endswith(".py")]
    modules = [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in modules]
    code = f"""
import importlib, os, signal, sys
for system in ("this one", "Windows"):
    for module in {modules}:
        importlib.import_module(module)
    print(sys.modules["alpaca"].__file__)
    for module in {modules}:
        del sys.modules[module]
    sys.modules |= {{"fcntl": None, "resource": None}}
    for name in "SIGUSR1 SIGUSR2 SIGHUP SIGKILL".split():
        vars(signal).pop(name, None)
    for name in "O_DIRECTORY O_NOFOLLOW posix_fadvise sysconf".split():
        vars(os).pop(name, None)
"""
    result = run_script("-c", code, cwd=tmp_path / "here", env={"PYTHONPATH": str(tmp_path / "site")})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(tmp_path / "site" / "alpaca" / "__init__.py")] * 2


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py") if path.name != "utils.py"))
def test_a_script_without_the_environment_says_what_to_activate_or_install(script):
    argv = ["--model_path", "m"] if script == "chat.py" else ["--help"]  # its help needs no library
    result = run_script("-S", script, *argv)  # -S: no site-packages
    assert_one_line_error(result, " has no ", "source .venv/bin/activate", "pip install -r requirements.txt")


def test_one_harmless_warning_of_bitsandbytes_is_silenced_and_no_other():
    """It has that warning as it is imported, on a CPU with avx512_bf16."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def shown(message: str) -> bool:
        return bool(logger.filter(logger.makeRecord(logger.name, logging.WARNING, "", 0, message, (), None)))

    importlib.import_module("alpaca.common.environment")
    assert not shown("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure …")
    assert shown("Failed to load the CPU library")
