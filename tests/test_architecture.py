import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted((ROOT / "euroflax").rglob("*.py"))
RANKS = {
    "languages": 0,
    "experiment": 1,
    "folders": 2,
    "accelerators": 1,
    "ending": 2,
    "processes": 3,
    "watch": 4,
    "devices": 4,
    "console": 3,
    "sharding": 3,
    "data": 3,
    "model": 4,
    "checkpoint": 5,
    "huggingface": 5,
    "generation": 5,
    "evaluation": 6,
    "training": 7,
    "planning": 8,
    "tables": 9,
    "report": 8,
    "comparison": 9,
    "checking": 10,
    "verbs": 11,
    "bench": 11,
    "interface": 12,
    "commands": 12,
    "run": 13,
    "sample": 0,
}
RANK_OF_PACKAGE_INIT = 14


def part(path: pathlib.Path) -> str:
    relative = path.relative_to(ROOT / "euroflax")
    return relative.parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_level(path: pathlib.Path) -> ast.Module:
    tree = ast.parse(path.read_text())
    body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.Module(body, [])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = part(path)
    rank = RANK_OF_PACKAGE_INIT if here == "__init__" else RANKS[here]
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "euroflax" and len(parts) > 1 and parts[1] in RANKS and parts[1] != here:
            assert RANKS[parts[1]] < rank, f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_in_their_rooms(path):
    here, relative = part(path), path.relative_to(ROOT / "euroflax").as_posix()
    everywhere, top = (
        {name.split(".")[0] for name in imports(tree)} for tree in (ast.parse(path.read_text()), module_level(path))
    )
    if here != "model" and relative != "training/step.py":
        assert "flax" not in everywhere
    assert "grain" not in top
    if here in ("data", "experiment", "languages", "folders", "devices", "run", "__init__") or "record" in relative:
        assert "jax" not in top and "orbax" not in top
    if here in ("experiment", "languages"):
        assert everywhere <= set(sys.stdlib_module_names) | {"euroflax"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_stays_within_its_budget(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
            arguments = node.args
            assert len(arguments.args) + len(arguments.kwonlyargs) <= 8, node.name
            assert arguments.kwarg is None, f"{node.name} passes **kwargs through"


def test_what_must_not_exist_does_not():
    names = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts and ".git" not in path.parts}
    assert not names & {"utils.py", "common.py", "experimental"}
    assert not [name for name in names if name.endswith(("_v2.py", ".yaml", ".yml"))]
    for path in MODULES:
        assert "if model_name ==" not in path.read_text()


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.split("/")[0] for name in listed.splitlines()}
    plan = {"pyproject.toml", "README.md", "LICENSE", "euroflax", "experiments", "tests", "docs"}
    assert {name for name in top if not name.startswith(".")} <= plan


def test_importing_euroflax_and_asking_for_help_load_nothing_heavy():
    code = (
        "import sys, euroflax, euroflax.run\n"
        "try: euroflax.run.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'grain', 'orbax', 'flax', 'pyarrow', 'rich', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_config_field_has_a_docstring():
    tree = ast.parse((ROOT / "euroflax/experiment/schema.py").read_text())
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.name}.{field.target.id}"
