"""The house: a room per concept, imports run downward only, files stay small, a name means one thing."""

from __future__ import annotations

import ast
import statistics
from graphlib import TopologicalSorter
from pathlib import Path

import fastguard

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
    """The modules of fastguard that `module` imports, also within functions, but for type checkers; names below `fastguard`."""
    checked = [n for n in ast.walk(TREES[module]) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    unread = {inner for block in checked for inner in ast.walk(block)}
    found = set()
    for node in (n for n in ast.walk(TREES[module]) if n not in unread):
        if isinstance(node, ast.Import):
            found |= {"__init__" if alias.name == "fastguard" else _known(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = f"fastguard.{module}".split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *filter(None, [node.module])])
            homes = fastguard._HOMES if source == "fastguard" else {}  # public names live elsewhere
            names = [f"fastguard.{homes[n]}" if n in homes else f"{source}.{n}" for n in (a.name for a in node.names)]
            found |= {_known(name) or _known(source) for name in names}
    return {name for name in found if name} - {module}


def _known(name: str) -> str | None:
    inside = name.removeprefix("fastguard.")
    return next((one for one in (inside, f"{inside}.__init__") if name != inside and one in FILES), None)


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


def test_the_median_file_is_small():
    assert statistics.median(LINES.values()) <= 100


def test_the_largest_file():
    assert not (longer := {module: lines for module, lines in LINES.items() if lines > 300}), longer


def test_the_library_is_small():
    assert sum(LINES.values()) <= 11_000, sum(LINES.values())


def test_the_wheel_imports_no_bench():
    found = {m for m, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("bench")}  # fmt: skip
    assert not found


def test_a_class_has_one_room():
    rooms: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                rooms.setdefault(node.name, set()).add(module.split(".")[0])
    assert not (twice := {name: where for name, where in rooms.items() if len(where) > 1}), twice


def test_no_module_hides_a_public_name():
    assert not set(fastguard.__all__) & {module.split(".")[0] for module in FILES}
