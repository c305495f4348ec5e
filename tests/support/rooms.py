"""The rooms of the package, read from its source alone: who imports whom, and which map lists what."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "medusa_apar"
MAPPED = ("heads", "eval", "triton_kernels")  # folders that lie beside the package; see setup.py

# From top to bottom: a room imports from the rows below its own alone.
ROOMS = {
    "commands": ("commands",),
    "eval": ("eval",),
    "serve": ("serve",),
    "top": (
        "attaching",
        "generate",
        "call",
        "facts",
        "requests",
        "new_request",
        "loading",
        "output",
        "checks",
        "custom_generate",
    ),
    "heads": ("heads",),
    "display": ("display",),
    "engine": ("engine",),
    "finetune": ("finetune",),
    "events": ("events",),
    "runtimes": ("runtimes",),
    "verify": ("verify",),
    "forest": ("forest",),
    "drafting": ("drafting",),
    "kv": ("kv",),
    "models": ("models",),
    "threads": ("threads",),
    "base": ("job", "arguments", "reading", "json_files", "said"),
    "triton_kernels": ("triton_kernels",),
}
KNOW_NOBODY = ("base", "triton_kernels")
FRONT_DOORS = ("__init__", "__main__")  # of the package: they belong to no room, and may open any
SCRIPTS = ("custom_generate", "peers_workers")  # folders of what others run: no packages
FOREIGN = ("llama.cpp", "gen_judgment.py")  # names of others that look like files of ours

_ROOM_OF = {member: room for room, members in ROOMS.items() for member in members}
_HEIGHT = {room: height for height, room in enumerate(reversed(ROOMS))}
_MAP_LINE = re.compile(r"^ *(\w+\.\w+|\w+/) +(?=\S)", re.MULTILINE)
_IMPORT = re.compile(r"from (?P<module>medusa_apar[\w.]*) import (?P<names>\w+(?: as \w+)?(?:, \w+(?: as \w+)?)*)")
_RUN = re.compile(r"-m (?P<module>medusa_apar\.[\w.]*\w)")
_FILE_NAME = re.compile(r"(?<![\w./*-])(?:\w+/)*\w+\.(?:py|cpp|h|css|sh|ipynb)\b")


@dataclass(frozen=True)
class Import:
    """One name that one statement imports: `target` is the full name of a module, or of something in one."""

    line: int
    target: str


@dataclass(frozen=True)
class Module:
    name: str  # as it is imported
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), str(self.path))

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def below_package(self) -> str:
        """The first part of the name below the package: a room's folder, or a module that lies flat."""
        return self.name.partition(".")[2].partition(".")[0] or "__init__"

    @property
    def imports(self) -> list[Import]:
        """All there are: at the top, in functions and under TYPE_CHECKING, absolute, relative and by a literal name."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [Import(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = [*self._above(node.level), *filter(None, [node.module])]
                found += [Import(node.lineno, ".".join([*start, alias.name])) for alias in node.names]
            elif isinstance(node, ast.Call) and (name := _imported_by_name(node)):
                found.append(Import(node.lineno, name))
        return found

    def _above(self, level: int) -> list[str]:
        if not level:
            return []
        parts = self.name.split(".")
        return parts[: len(parts) - level + self.is_package]


def _imported_by_name(call: ast.Call) -> str | None:
    """What `import_module("...")` imports, and `importlib.resources.files("...")` too."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    if name in ("import_module", "__import__", "files") and isinstance(first, ast.Constant):
        return str(first.value)
    return None


def modules(root: Path) -> list[Module]:
    """Every module of the package, the folders that setup.py maps into it among them."""
    found = []
    for folder, prefix in ((root / PACKAGE, ()), *((root / name, (PACKAGE,)) for name in MAPPED)):
        for path in sorted(folder.rglob("*.py")):
            parts = [*prefix, *path.relative_to(root).with_suffix("").parts]
            found.append(Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def room_of(target: str) -> str | None:
    """The room in which the target of an import lies; None for another package, and for the front door's `__version__`.

    What else the front door hands on (`medusa_apar.load`) is the top room's, whoever made it.
    """
    package, _, rest = target.partition(".")
    if package in MAPPED:  # by the name that the folder has in a checkout
        return package
    if package != PACKAGE or rest == "__version__":
        return None
    return _ROOM_OF.get(rest.partition(".")[0], "top")


def arrows_up(root: Path) -> Iterator[str]:
    """Every import that does not go down the table of rooms, and every module that has no row in it.

    Without arrows up there is no circle between rooms either.
    """
    for module in modules(root):
        where = module.path.relative_to(root)
        if module.below_package in FRONT_DOORS:
            continue
        own = _ROOM_OF.get(module.below_package)
        if own is None:
            yield f"{where}: {module.below_package} has no row in the table of rooms"
            continue
        for imported in module.imports:
            room = room_of(imported.target)
            if room is None or room == own:
                continue
            if own in KNOW_NOBODY:
                yield f"{where}:{imported.line}: {own} knows nobody, but imports {imported.target} from {room}"
            elif _HEIGHT[room] > _HEIGHT[own]:
                yield f"{where}:{imported.line}: {own} imports {imported.target} from {room}, which lies above it"


def tensors_in_threads(root: Path) -> Iterator[str]:
    """Every import of a tensor library in the room of threads, but for the ids' logits processor."""
    for module in modules(root):
        if module.below_package != "threads" or module.path.name == "control_tokens.py":
            continue
        for imported in module.imports:
            if imported.target.partition(".")[0] in ("torch", "numpy", "transformers"):
                yield f"{module.path.relative_to(root)}:{imported.line}: threads imports {imported.target}"


def wrong_maps(root: Path) -> Iterator[str]:
    """Every line that a package's map lacks or has too much, every module without a docstring,
    every folder without a map.

    A map is part of the docstring of `__init__`: a line for each module (`name.py  what it is`) and for each folder of
    modules (`name/  what it is`). It may name other files of the folder too.
    """
    folders = {module.path.parent for module in modules(root)}
    for folder in sorted(folders):
        if folder.name not in SCRIPTS and not (folder / "__init__.py").exists():
            yield f"{folder.relative_to(root)}: has modules, but no __init__.py"
    for module in modules(root):
        where = module.path.relative_to(root)
        if not module.docstring or module.docstring.startswith("TODO"):
            yield f"{where}: has no docstring"
        if not module.is_package:
            continue
        named = _MAP_LINE.findall(module.docstring)
        for name in _to_be_named(root, module.path.parent):
            if name not in named:
                yield f"{where}: does not name {name}"
        for name in sorted(set(named)):
            if not _folder_of(root, module.path.parent, name).exists():
                yield f"{where}: names {name}, which does not exist"
            if named.count(name) > 1:
                yield f"{where}: names {name} {named.count(name)} times"


def _to_be_named(root: Path, folder: Path) -> list[str]:
    modules_there = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    folders = [path.name for path in folder.iterdir() if any(path.rglob("*.py"))]
    if folder == root / PACKAGE:
        folders += [name for name in MAPPED if (root / name).exists()]
    return sorted([*modules_there, *(f"{name}/" for name in folders)])


def _folder_of(root: Path, folder: Path, name: str) -> Path:
    mapped = folder == root / PACKAGE and name.rstrip("/") in MAPPED
    return (root if mapped else folder) / name


def stale_names(root: Path, documents: tuple[str, ...]) -> Iterator[str]:
    """Every file name in the package's source, or in one of these documents, that no file has.

    A name may be a path: then its folders must be the file's.
    """
    folders = [root / name for name in (PACKAGE, *MAPPED, "tests", "notebooks", "examples")]
    paths = [path.relative_to(root) for folder in folders for path in folder.rglob("*.*")]
    known = {path.name for path in root.glob("*.*")} | set(FOREIGN)
    known |= {"/".join(path.parts[start:]) for path in paths for start in range(len(path.parts))}
    for path in [*(module.path for module in modules(root)), *(root / name for name in documents)]:
        for name in sorted(set(_FILE_NAME.findall(path.read_text(encoding="utf-8"))) - known):
            yield f"{path.relative_to(root)}: names {name}, which does not exist"


def imports_of_nothing(root: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    """Every import of the package that finds nothing, and every `-m`, wherever one is written: in scripts within
    strings, shell scripts, notebooks and documents too."""
    known = {module.name: module for module in modules(root)}
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        text = path.read_text(encoding="utf-8")
        for match in _IMPORT.finditer(text):
            names = re.findall(r"(\w+)(?: as \w+)?", match["names"])
            for name in names:
                module = known.get(match["module"])
                if module is None or (f"{module.name}.{name}" not in known and not _says(module, name)):
                    yield f"{path.relative_to(root)}: {match['module']} has no {name}"
        for match in _RUN.finditer(text):
            if match["module"] not in known:
                yield f"{path.relative_to(root)}: there is no {match['module']} to run"


def _says(module: Module, name: str) -> bool:
    return re.search(rf"\b{name}\b", module.path.read_text(encoding="utf-8")) is not None


def imports_of_tests(tests: Path) -> Iterator[str]:
    """Every import of a test file or a conftest.py by another file of the tests: what two share lies in support/."""
    for path in sorted(tests.rglob("*.py")):
        module = Module(".".join(path.relative_to(tests.parent).with_suffix("").parts), path)
        for imported in module.imports:
            package, *parts = imported.target.split(".")
            if package == "tests" and any(part.startswith("test_") or part == "conftest" for part in parts):
                yield f"{path.relative_to(tests.parent)}:{imported.line}: imports {imported.target}"
