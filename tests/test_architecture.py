"""The house keeps its order: imports run one way, and no two files import each other."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "laplace_debiased"
FLOORS = (
    {"_version", "errors"},
    {"checks"},
    {"options", "files", "parallel"},
    {"network"},
    {"likelihoods", "data"},
    {"curvature"},
    {"debiasing", "operators"},
    {"predictive"},
    {"estimation"},
    {"tuning"},
    {"posterior", "diagnostics", "optim"},
    {"calibration", "factory"},
    {"demo"},
    {"cli"},
)
"""Rooms from the ground up: one may use what is below it."""


def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> dict[str, set[str]]:
    """What every module imports of the package, also for type checkers only."""
    known, graph = modules(), defaultdict(set)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    graph[name].add(whole if whole in known else str(node.module))
    return graph


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_circle_of_imports() -> None:
    graph, done = imports(), set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_rooms_use_what_is_below_them() -> None:
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    for module, targets in imports().items():
        for target in targets:
            here, there = room(module), room(target)
            if here in floor and there in floor and here != there:
                assert floor[there] < floor[here], f"{module} uses {target}"


def test_every_room_has_its_place() -> None:
    rooms = {room(module) for module in modules()} - {"", "__main__"}
    assert rooms == set().union(*FLOORS)


def test_posterior_is_laplace_torchs_class_and_one_mixin() -> None:
    from laplace_debiased import posterior

    for name in posterior.__all__:
        own = [
            base.__name__
            for base in getattr(posterior, name).__mro__
            if base.__module__.startswith(f"{PACKAGE}.posterior")
        ]
        assert own[-1] == "DebiasedPosterior"
        assert len(own) == (3 if "LL" in name else 2)
