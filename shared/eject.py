"""Copy a recipe out of the repository, so that it runs and can be changed inside another project.

    python -m shared.eject recipes/gpt ../my_gpt
    python -m shared.eject recipes/gpt/pretrain.py ../my_gpt        # without the family's other stages

The copy keeps the layout, so the recipe's text does not change. With the recipe go:

* the README.md, configs/ and assets/ of its folder;
* the modules of `shared` that it imports, directly or through others, also inside functions;
* each file or folder of shared/samples whose name one of these modules holds as a string, and the page on its licence;
* accelerate_configs/, LICENSE and NOTICE;
* the lines of requirements.txt that this code imports, and those that no import shows: torch, accelerate (it
  launches), tensorboard (`--report_to`) and, where a copied accelerate config names it, deepspeed.
"""

import argparse
import ast
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from shared.command_line import UsageError, exit_codes

REPOSITORY = Path(__file__).resolve().parents[1]
ALWAYS_REQUIRED = ("torch", "accelerate", "tensorboard")
DISTRIBUTION_OF = {"yaml": "PyYAML", "PIL": "pillow", "sklearn": "scikit-learn"}  # where the import has another name
# What one choice of a field needs, which says so where it is not there, and what an accelerate config asks for.
OPTIONAL = {"torch_fidelity", "deepspeed"}
GENERAL = ("accelerate_configs/**/*", "LICENSE", "NOTICE")


def eject(source: Path, target: Path, repository: Path = REPOSITORY) -> str:
    """Copy a recipe and what it needs, and say what was copied and how to run it.

    Args:
        source: the folder of a recipe family, or one of its stages.
        target: a folder outside the repository that is empty or does not exist.
        repository: the folder that holds `recipes/` and `shared/`.

    Raises:
        UsageError: one of these is not so, or the recipe imports what requirements.txt does not have.
    """
    path, name = source.resolve(), f"target: {str(target)!r}: expected a folder"
    stages = [path] if path.suffix == ".py" and path.is_file() else sorted(path.glob("*.py"))
    if not stages or stages[0].parent.parent != repository / "recipes":
        raise UsageError(f"source: {str(source)!r}: expected a recipe's folder, such as recipes/gpt, or a stage in one")
    if target.resolve().is_relative_to(repository):
        raise UsageError(f"{name} outside the repository {repository}")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"{name} that is empty or does not exist")

    family = stages[0].parent
    modules = shared_modules(stages, repository)
    data = shared_data([*stages, *modules], repository)
    beside = [file for part in ("README.md", "configs/**/*", "assets/**/*") for file in _files(family, part)]
    general = [file for part in GENERAL for file in _files(repository, part)]
    requirements = trimmed_requirements([*stages, *modules], general, repository)
    try:
        for file in [*stages, *beside, *modules, *data, *general]:
            copy = target / file.relative_to(repository)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
        (target / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{name} that can be written, got {error}") from error

    folder = family.relative_to(repository).as_posix()
    first = next((stage for stage in stages if stage.name == "pretrain.py"), stages[0])
    return (
        f"copied {folder}/ ({', '.join(stage.name for stage in stages)} and {len(beside)} other files), {len(modules)} "
        f"modules and {len(data)} data files of shared/, {len(general)} configs and licences, {len(requirements)} "
        f"requirements\nrun it: cd {shlex.quote(str(target))} && pip install -r requirements.txt && "
        f"accelerate launch {folder}/{first.name}"
    )


def shared_modules(files: Iterable[Path], repository: Path) -> list[Path]:
    """The files of `shared` that `files` import, and those that these import in turn, sorted."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        for name in _imports(waiting.pop(), repository):
            module = repository.joinpath(*name.split("."))
            path = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            if name.split(".")[0] == "shared" and path.is_file() and path not in found:
                found.add(path)
                waiting.append(path)
    return sorted(found)


def shared_data(files: Iterable[Path], repository: Path) -> list[Path]:
    """The files of shared/samples that `files` name in a string, and the pages beside them."""
    strings = {node.value for file in files for node in ast.walk(_parse(file)) if isinstance(node, ast.Constant)}
    entries = [*_files(repository, "shared/samples/*/**/*"), *_files(repository, "shared/samples/*")]
    pages = [file for file in entries if file.parent.name == "samples" and file.suffix in (".md", "")]
    folder = repository / "shared" / "samples"
    named = [file for file in entries if file.relative_to(folder).parts[0] in strings and file not in pages]
    return sorted([*named, *pages]) if named else []


def trimmed_requirements(files: Iterable[Path], configs: Iterable[Path], repository: Path) -> list[str]:
    """The lines of requirements.txt that `files` and `configs` need, in its order, without comments.

    Raises:
        UsageError: a file imports a package that has no line there.
    """
    text = (repository / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for raw in text.splitlines() if (line := raw.split("#")[0].strip())]
    names = [_normalized(re.split(r"[^\w.-]", line)[0]) for line in lines]
    needed = {_normalized(name) for name in ALWAYS_REQUIRED}
    if any("deepspeed" in file.read_text(encoding="utf-8").lower() for file in configs if file.suffix == ".yaml"):
        needed.add("deepspeed")
    for file in files:
        packages = {name.split(".")[0] for name in _imports(file, repository)}
        for package in sorted(packages - sys.stdlib_module_names - OPTIONAL - {"shared"}):
            distribution = _normalized(DISTRIBUTION_OF.get(package, package))
            if distribution not in names:
                raise UsageError(f"requirements.txt: expected a line for {package!r}, which {file} imports")
            needed.add(distribution)
    return [line for line, name in zip(lines, names, strict=True) if name in needed]


def _imports(file: Path, repository: Path) -> set[str]:
    """Every dotted name that `file` may import, with its parents: `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(_parse(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(repository).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {".".join(parts[: end + 1]) for parts in (name.split(".") for name in names) for end in range(len(parts))}


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise UsageError(f"source: {file}: expected Python, got {error}") from error


def _files(folder: Path, pattern: str) -> list[Path]:
    found = (file for file in folder.glob(pattern) if file.is_file() and "__pycache__" not in file.parts)
    return sorted(file for file in found if not file.name.startswith("."))


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def main() -> None:
    """Read the command line and eject."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a recipe family, or one of its stages")
    parser.add_argument("target", type=Path, help="new or empty folder outside the repository")
    arguments = parser.parse_args()
    print(eject(arguments.source, arguments.target))  # noqa: T201 (there is no accelerator here)


if __name__ == "__main__":
    with exit_codes():
        main()
