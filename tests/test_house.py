"""The plan of the house: what lies where, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parents[1]
TOP = ["losses", "models", "train", "data", "fsdp", "sample", "eval", "test_losses"]
FILES = {f"{name}.py" for name in TOP} | {"README.md", "LICENSE", "requirements.txt"}
FOLDERS = {"support", "lab", "tests", "recipes", "docs", "assets"}
STEP = ["draw_levels", "draw_batch", "iterate", "student_step", "read_scores", "extra_gradient"]
STEP += ["weigh_by_density_ratio", "divergence_weight", "step_metrics", "fake_score_step"]


def sources():
    paths = [
        *ROOT.glob("*.py"),
        *(p for name in ("support", "lab") for p in ROOT.glob(f"{name}/**/*.py")),
    ]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def imports_of(path, known):
    """Our modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name in known}


def test_the_top_level_is_the_plan():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in tops if name[0] != "."} == FILES | FOLDERS


def test_imports_point_one_way():
    known = sources()
    graph = {name: imports_of(path, known) for name, path in known.items()}
    assert not graph["losses"] and not graph["support.cli"]
    for name, imported in graph.items():
        if not name.startswith("lab") and name != "test_losses":
            assert not any(other.startswith("lab") for other in imported), name
    done, waiting = set(), dict(graph)
    while waiting:  # a circle is what cannot be put in order
        ready = {name for name, imported in waiting.items() if imported <= done | {name}}
        assert ready, f"a circle among {sorted(waiting)}"
        done |= ready
        waiting = {name: imported for name, imported in waiting.items() if name not in ready}


def test_the_step_has_no_lambda_and_no_inner_function():
    functions = {}
    for node in ast.parse(Path(train.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
    for name in STEP:
        inside = [node for node in ast.walk(functions[name]) if node is not functions[name]]
        assert not any(isinstance(node, (ast.Lambda, ast.FunctionDef)) for node in inside), name


@pytest.mark.parametrize("script", ["train", "sample", "eval", "data", "support.export"])
@pytest.mark.parametrize("flag, status", [("--help", 0), ("--hlep", 2)])
def test_help_and_mistakes_are_answered_before_torch_is_imported(script, flag, status):
    code = f"""
import runpy, sys
sys.argv = ["x", {flag!r}]
try:
    runpy.run_module({script!r}, run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
    run = ["-c", code]
    done = subprocess.run(
        [sys.executable, *run], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status and done.stdout.splitlines()[-1] == "False"
