"""The house: a room per concept, imports run downward only, files stay small, a name means one thing."""

from __future__ import annotations

import ast
import statistics
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"checks", "files", "kernels"},
    {"policies", "schedules"},
    {"loop"},
    {"capture"},
    {"pipelines"},
    {"batch", "fronts", "testbed", "syncs"},
    {"commands"},
    {"__init__", "__main__"},  # the package's own names, imported on first use
)
FILES = {
    ".".join(path.relative_to(root).with_suffix("").parts): path
    for root, folder in ((ROOT / "fastguard", "**/*.py"), (ROOT, "kernels/*.py"))
    for path in root.glob(folder)
    if root == ROOT or "kernels" not in path.relative_to(root).parts
}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}
LINES = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}


def imports(module: str) -> set[str]:
    """The modules of fastguard that `module` imports anywhere but for type checkers, as names below `fastguard`."""
    skipped = [n for n in ast.walk(TREES[module]) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    unread = {inner for block in skipped for inner in ast.walk(block)}
    names = set()
    for node in (n for n in ast.walk(TREES[module]) if n not in unread):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = f"fastguard.{module}".split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    known = {name.removeprefix("fastguard.") for name in names if name.startswith("fastguard.")}
    return {known_as for name in known for known_as in (name, f"{name}.__init__") if known_as in FILES} - {module}


IMPORTS = {module: imports(module) for module in FILES}


def floor(module: str) -> int:
    return next(n for n, rooms in enumerate(FLOORS) if module.split(".")[0] in rooms)


def test_imports_run_downward():
    upward = [f"{a} imports {b}" for a, found in IMPORTS.items() for b in found if floor(a) < floor(b)]
    assert not upward, upward


def test_no_circle_of_rooms_or_modules():
    rooms: dict[str, set[str]] = {}
    for module, found in IMPORTS.items():
        rooms.setdefault(room := module.split(".")[0], set()).update({b.split(".")[0] for b in found} - {room})
    for graph in (rooms, IMPORTS):
        TopologicalSorter(graph).prepare()


def test_sizes():
    assert max(LINES.values()) <= 300, {m: n for m, n in LINES.items() if n > 300}
    assert statistics.median(LINES.values()) <= 100 and sum(LINES.values()) <= 11_000, sum(LINES.values())


def test_the_wheel_imports_no_bench():
    found = {m for m, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("bench")}  # fmt: skip
    assert not found


def test_one_name_one_thing():
    rooms: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                rooms.setdefault(node.name, set()).add(module.split(".")[0])
            if isinstance(node, ast.FunctionDef):
                assert node.name != module.split(".")[-1] or module == "kernels.guided_step", f"{module}.{node.name}"
    assert not (twice := {name: where for name, where in rooms.items() if len(where) > 1}), twice
