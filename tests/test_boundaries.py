"""The boundaries of the design, each tested in a fresh interpreter."""

from __future__ import annotations

import ast
import sys

import pytest
from conftest import ROOT, run_script

SCRIPTS = {"generate_instruction", "train", "weight_diff", "chat", "analyze_data", "judge"}
HEAVY = ("torch", "transformers", "openai", "fire", "numpy")


def loaded_by(module: str) -> set[str]:
    """Top-level modules in sys.modules after importing one module in a new process."""
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = run_script("-c", code)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_utils_is_light():
    assert loaded_by("utils").isdisjoint(HEAVY)


def test_the_package_itself_is_light():
    assert loaded_by("alpaca").isdisjoint(HEAVY)


def test_generating_loads_no_torch():
    assert loaded_by("generate_instruction").isdisjoint({"torch", "transformers"})


def test_judging_waits_with_what_is_heavy_until_a_task_needs_it():
    assert loaded_by("judge").isdisjoint({"torch", "transformers", "openai", "gradio", "matplotlib"})


@pytest.mark.parametrize("script", ["train", "weight_diff", "chat"])
def test_what_touches_weights_loads_no_api_client(script):
    assert "openai" not in loaded_by(script)


def test_the_teacher_waits_with_torch_until_it_converts():
    assert loaded_by("alpaca.embedded_model").isdisjoint({"torch", "transformers"})


@pytest.mark.parametrize("path", sorted((ROOT / "alpaca").glob("**/*.py")), ids=lambda path: path.name)
def test_the_package_never_imports_a_script(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert imported.isdisjoint(SCRIPTS)


def test_the_prompt_template_is_written_once():
    """ "### Response:" stands in utils.py alone, among all that is not a test."""
    files = [*ROOT.glob("*.py"), *(ROOT / "alpaca").glob("**/*.py")]
    assert [file.name for file in files if "### Response:" in file.read_text()] == ["utils.py"]


def test_every_requirement_is_pinned_and_says_who_needs_it():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement, _, reason = line.partition("#")
            assert "==" in requirement and len(reason.strip()) > 10, line


def test_this_python_is_supported():
    assert sys.version_info >= (3, 10)
