"""The map of who may import whom stays true."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "shared": {"shared"},
    "client": {"client", "shared"},
    "server": {"server", "shared"},
    "simulations": {"simulations", "client", "server", "shared"},
}


def forbidden_imports(root: Path) -> list[str]:
    """One line of advice for each import that points the wrong way, also inside functions."""
    problems = []
    for package, allowed in MAY_IMPORT.items():
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for module in _modules(node):
                    top = module.split(".")[0]
                    if top in {*MAY_IMPORT, "tests", "benchmarks"} - allowed:
                        problems.append(
                            f"{path.relative_to(root)}:{node.lineno} imports {module}; {_advice(package, top)}"
                        )
    return problems


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return [node.module]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in {
        "importlib.import_module",
        "import_module",
        "__import__",
    }:
        first = node.args[0] if node.args else None
        return [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
    return []


def _advice(package: str, imported: str) -> str:
    if imported in {"tests", "benchmarks"}:
        return f"move what it needs into {package}"
    if package == "shared":
        return f"move what it needs into shared, or this code into {imported}"
    return f"move what it needs into {package} or shared"


def test_nobody_imports_against_the_map():
    assert forbidden_imports(ROOT) == []


def test_the_walk_sees_this_repository():
    assert all(list((ROOT / package).rglob("*.py")) for package in MAY_IMPORT)


def test_the_walk_has_teeth(tmp_path):
    sources = {
        "client/app.py": "import json\nfrom server.budget import spent\n",
        "client/fine.py": "from shared.errors import FedAugError\nfrom client import store\n",
        "server/late.py": "def main():\n    import client.owner as owner\n",
        "shared/rng.py": 'import importlib\nimportlib.import_module("simulations.study")\n',
        "simulations/run.py": "import server, client\nfrom tests import helpers\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert forbidden_imports(tmp_path) == [
        "shared/rng.py:2 imports simulations.study; move what it needs into shared, or this code into simulations",
        "client/app.py:2 imports server.budget; move what it needs into client or shared",
        "server/late.py:2 imports client.owner; move what it needs into server or shared",
        "simulations/run.py:2 imports tests; move what it needs into simulations",
    ]
