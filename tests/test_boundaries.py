"""The boundaries of the design, each tested in a fresh interpreter."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT, run_script

SCRIPTS = {"generate_instruction", "train", "weight_diff", "chat", "analyze_data", "judge", "utils"}
HEAVY = ("torch", "transformers", "openai", "numpy")


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


@pytest.mark.parametrize("script", ["generate_instruction", "analyze_data"])
def test_what_makes_or_reads_data_loads_no_torch(script):
    assert loaded_by(script).isdisjoint({"torch", "transformers"})


def test_judging_waits_with_what_is_heavy_until_a_task_needs_it():
    assert loaded_by("judge").isdisjoint(
        {"torch", "transformers", "openai", "gradio", "matplotlib", "scipy", "rouge_score"}
    )


@pytest.mark.parametrize("script", ["train", "weight_diff", "chat"])
def test_what_touches_weights_loads_no_api_client(script):
    assert "openai" not in loaded_by(script)


def test_the_teacher_waits_with_torch_until_it_converts():
    assert loaded_by("alpaca.embedded_model").isdisjoint({"torch", "transformers"})


ARROWS = {  # room → the rooms that it may import from, beside the modules that lie beneath all rooms
    "common": {""},
    "": {"common"},
    "endpoint": {"common"},
    "data": {"common"},
    "weights": {"common"},
    "inference": {"common", "weights"},
    "training": {"common", "weights", "inference"},
    "judging": {"common", "endpoint", "data", "inference"},
}
PACKAGE = sorted((ROOT / "alpaca").rglob("*.py"))


def room(parts: tuple[str, ...]) -> str:
    """The room of a module of the package, given as what follows "alpaca"; "" for one that is in no room."""
    return parts[0] if parts and (ROOT / "alpaca" / parts[0]).is_dir() else ""


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_rooms_that_the_design_puts_before_it(path):
    here = room(path.relative_to(ROOT / "alpaca").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for top, *rest in (name.split(".") for name in names):
            assert top not in SCRIPTS, f"{path.name} imports the script {top}"
            assert top != "alpaca" or room(rest) in ARROWS[here] | {here, ""}, f"{here} may not import {rest}"


ROOMS = [path for path in PACKAGE if path.name == "__init__.py" and path.parent.name != "alpaca"]


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.parent.name)
def test_a_room_says_what_it_is_for_and_is_small_enough_to_search(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)) and len(ast.parse(text).body) == 1, "more than a docstring"
    assert len(list(path.parent.glob("*.py"))) - 1 <= 12, "more than 12 modules: split the room, or merge some"


def test_the_prompt_template_is_written_once():
    """ "### Response:" is in prompts.py alone, among all that is not a test."""
    files = [*ROOT.glob("*.py"), *(ROOT / "alpaca").glob("**/*.py")]
    assert [file.name for file in files if "### Response:" in file.read_text()] == ["prompts.py"]
