"""The layout shows the architecture: rooms import downwards only, and the README's tree is what is there."""

import ast
from pathlib import Path

import pytest

from tests import readme_tree
from tests.conftest import ROOT

# Those of a line do not import each other; a line imports from the lines after it.
LEVELS = (
    ("run",),
    ("performance", "metrics", "diffusion"),
    ("models", "optim", "images"),
    ("text",),
    ("data", "runtime"),
    ("fields",),
    ("command_line",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = [path for path in sorted((ROOT / "shared").rglob("*.py")) if "samples" not in path.parts]


def room_of(module: Path) -> str:
    """Folder below shared/, or the module itself where it lies beside the rooms."""
    return module.relative_to(ROOT / "shared").parts[0].removesuffix(".py")


def imported_by(module: Path) -> set[str]:
    """Names of all that a file imports, also inside functions."""
    nodes = list(ast.walk(ast.parse(module.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_has_a_level() -> None:
    rooms = {room_of(module) for module in MODULES} - {"__init__", "eject"}  # which is a program
    assert rooms == set(LEVEL_OF)
    folders = {path.parent.name for path in (ROOT / "shared").glob("*/__init__.py")}
    assert set(readme_tree.ROOMS) == folders


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(module: Path) -> None:
    names = imported_by(module)
    assert not [name for name in names if name.split(".")[0] in ("recipes", "tests")]
    room = room_of(module)
    if module.name == "__init__.py":
        assert not names, "a room hands no names on"
    elif room in LEVEL_OF:
        used = {name.split(".")[1] for name in names if name.startswith("shared.")} - {room}
        upwards = sorted(other for other in used if LEVEL_OF[other] <= LEVEL_OF[room])
        assert not upwards, f"{room} imports {', '.join(upwards)}"


@pytest.mark.parametrize("stage", sorted((ROOT / "recipes").glob("*/*.py")), ids=lambda path: path.stem)
def test_a_recipe_imports_no_recipe(stage: Path) -> None:
    assert not [name for name in imported_by(stage) if name.split(".")[0] in ("recipes", "tests")]


def test_the_tree_of_the_readme_is_what_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == readme_tree.with_tree(text), "python tests/readme_tree.py writes it"


def test_tests_mirror_the_tree() -> None:
    for test in (ROOT / "tests/shared").rglob("test_*.py"):
        name = test.name.removeprefix("test_")
        assert (ROOT / "shared" / test.parent.relative_to(ROOT / "tests/shared") / name).is_file(), test
