"""Write the tree of README.md anew from the first lines of the modules; a test compares them.

python tests/readme_tree.py
"""

import ast
import json
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (  # from what a run is seen as down to the machine; each imports from those below it
    *("run", "performance", "metrics", "diffusion", "models", "optim", "images", "text", "data", "runtime"),
)
BEGIN, END = "## The tree\n", "\n## "  # what stands before the tree, and after it
INDENT, WIDTH = 36, 120


def first_line(module: Path) -> str:
    """Of its docstring."""
    return (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").splitlines()[0]


def entry(depth: int, name: str, text: str) -> str:
    """A name and what it is for, in as many lines as it needs."""
    head = f"{' ' * (4 + 2 * depth) + name:<{INDENT - 1}} "
    return textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=" " * INDENT, break_on_hyphens=False)


def tree() -> str:
    """The lines of the tree."""
    lines = [
        entry(
            0,
            "recipes/",
            "one folder a family, one file a stage; configs/ and assets/ beside them; what is of several families",
        )
    ]
    for family in sorted(path for path in (ROOT / "recipes").iterdir() if (path / "README.md").is_file()):
        title = (family / "README.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append(entry(1, f"{family.name}/", title))
        lines += [entry(2, stage.name, first_line(stage)) for stage in sorted(family.glob("*.py"))]
    lines += [entry(1, program.name, first_line(program)) for program in sorted((ROOT / "recipes").glob("*.py"))]
    for notebook in sorted((ROOT / "recipes").glob("*.ipynb")):
        title = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"][0]
        lines.append(entry(1, notebook.name, title.strip("# \n") + "."))
    shared = ROOT / "shared"
    lines.append(entry(0, "shared/", first_line(shared / "__init__.py")))
    lines += [entry(1, module.name, first_line(module)) for module in sorted(shared.glob("[!_]*.py"))]
    for room in ROOMS:
        lines.append(entry(1, f"{room}/", first_line(shared / room / "__init__.py")))
        lines += [entry(2, module.name, first_line(module)) for module in sorted((shared / room).glob("[!_]*.py"))]
    lines.append(entry(1, "samples/", "The embedded data and their licences."))
    lines.append(entry(0, "accelerate_configs/", "hardware: processes, engine, precision; slurm/"))
    lines.append(entry(0, "tests/", "mirrors the tree; benchmarks/ beside"))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def with_tree(readme: str) -> str:
    """The README with the tree as it is now."""
    head, begin, rest = readme.partition(BEGIN)
    return f"{head}{begin}\n{tree()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(with_tree(file.read_text(encoding="utf-8")), encoding="utf-8")
