"""What the structure of the code is, in figures: rooms and their order, sizes, docstrings, tests that mirror modules.

    python -m tests.structure

`tests/test_architecture.py` holds the rules; this file knows how to read the code. It parses and never imports it.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("runtime", "tokenizer_service", "scheduler_service", "detokenizer_service", "http_gateway", "kernels")
IMPORT_ROOT = "quartet."
MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 60
SHORT_FUNCTION_LINES = 8  # needs no docstring

# Each line may import itself and what stands above it: modules and packages (rooms), by the longest prefix that fits.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "runtime": (
        ("runtime.errors", "runtime.limits", "runtime.shorten", "runtime.version"),
        ("runtime.process",),
        ("runtime",),
        ("runtime.model_files",),
        ("runtime.settings",),
        ("runtime.launcher",),
        ("runtime.client.connection",),
        ("runtime.client.events",),
        ("runtime.api",),
        ("runtime.client",),
        ("runtime.bench", "runtime.local_models"),
        ("runtime.batch",),
        ("runtime.cli",),
        ("runtime.launch_server", "runtime.completion"),
    ),
    "scheduler_service": (
        ("scheduler_service.core", "scheduler_service.host"),
        ("scheduler_service.sampling", "scheduler_service.grammar"),
        ("scheduler_service.weights",),
        ("scheduler_service.model",),
        ("scheduler_service.execution",),
        ("scheduler_service.control",),
        ("scheduler_service",),
    ),
    "http_gateway": (
        ("http_gateway.ring", "http_gateway.parsers"),
        ("http_gateway.http",),
        ("http_gateway.generation",),
        ("http_gateway.routes",),
        ("http_gateway.native",),
        ("http_gateway.openai", "http_gateway.embedding"),
        ("http_gateway.batches",),
        ("http_gateway.admin",),
        ("http_gateway.anthropic",),
        ("http_gateway",),
    ),
    "kernels": (
        ("kernels.reference",),
        ("kernels.cpu", "kernels.triton"),
        ("kernels",),
    ),
}


@dataclass(frozen=True)
class Function:
    """A function or method of the product."""

    place: str  # path:line
    name: str
    lines: int
    public: bool  # neither it nor a class around it begins with an underscore, and it stands in no other function
    documented: bool
    is_kernel: bool  # compiled by Triton


def sources(*places: str) -> Iterator[Path]:
    """Python files under these directories of the repository; without any, the product's."""
    for place in places or PACKAGES:
        yield from sorted((ROOT / place).rglob("*.py"))


def name(path: Path) -> str:
    """A path as it stands in the repository."""
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """For example `runtime.errors`, without the import root that all share."""
    return name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(path: Path, *, only_at_import: bool = False) -> set[str]:
    """The absolute names that a file imports: `from a.b import c` counts as a.b and a.b.c."""
    found: set[str] = set()
    for node in at_import(tree(path)) if only_at_import else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def imports(path: Path, *, only_at_import: bool = False) -> set[str]:
    """`imported`, with our own modules named as they lie in the repository, without the root that all share."""
    return {module.removeprefix(IMPORT_ROOT) for module in imported(path, only_at_import=only_at_import)}


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: none inside functions, none for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from at_import(child)


@cache
def import_graph() -> dict[str, frozenset[str]]:
    """Module → modules of ours that it imports anywhere, for the type checker alone too."""
    modules = {module_of(path): path for path in sources() if path.name != "__init__.py"}
    return {module: frozenset(imports(path) & modules.keys()) for module, path in modules.items()}


def import_cycles() -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    graph, index, low = import_graph(), dict[str, int](), dict[str, int]()
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[-len(group) :]
            if len(group) > 1:
                cycles.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return cycles


def upward_imports() -> list[str]:
    """Imports of a layer that stands below the importing module's own, and imports between rooms of one line."""
    found = []
    for module, others in import_graph().items():
        for other in others:
            package = module.split(".")[0]
            if package == other.split(".")[0] and package in LAYERS:
                (own, own_room), (its, its_room) = layer_of(module), layer_of(other)
                if its > own or (its == own and its_room != own_room):
                    found.append(f"{module} imports {other}")
    return sorted(found)


def layer_of(module: str) -> tuple[int, str]:
    """The position of a module's layer in its package, and the entry of it that fits."""
    entries = [(entry, i) for i, line in enumerate(LAYERS[module.split(".")[0]]) for entry in line]
    fitting = [(entry, i) for entry, i in entries if module == entry or module.startswith(entry + ".")]
    entry, position = max(fitting, key=lambda found: len(found[0]))
    return position, entry


def functions() -> Iterator[Function]:
    """All functions of the product."""
    for path in sources():
        yield from functions_in(tree(path), path, public=True)


def functions_in(node: ast.AST, path: Path, public: bool) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            is_public = public and not child.name.startswith("_")
            decorators = {ast.unparse(decorator) for decorator in child.decorator_list}
            yield Function(
                place=f"{name(path)}:{child.lineno}",
                name=child.name,
                lines=(child.end_lineno or child.lineno) - child.lineno + 1,
                public=is_public,
                documented=ast.get_docstring(child) is not None or bool(decorators & {"overload", "override"}),
                is_kernel=any(re.search(r"\b(jit|kernel)\b", decorator) for decorator in decorators),
            )
            yield from functions_in(child, path, public=False)
        elif isinstance(child, ast.ClassDef):
            yield from functions_in(child, path, public and not child.name.startswith("_"))
        else:
            yield from functions_in(child, path, public)


def without_docstring() -> list[str]:
    """Public functions of more than a few lines that nothing is said about."""
    return [
        f"{function.place} {function.name}"
        for function in functions()
        if function.public and not function.documented and function.lines > SHORT_FUNCTION_LINES
    ]


def too_long() -> list[str]:
    """Files and functions beyond what is read in one sitting. The bodies of kernels are not counted."""
    files = [(name(path), len(path.read_text().splitlines())) for path in sources()]
    return [f"{place}: {lines} lines" for place, lines in files if lines > MOST_FILE_LINES] + [
        f"{function.place} {function.name}: {function.lines} lines"
        for function in functions()
        if function.lines > MOST_FUNCTION_LINES and not function.is_kernel
    ]


def tests_without_module() -> list[str]:
    """Unit tests whose place names no module: tests/unit/<package>/<room>/test_<module>.py mirrors it."""
    modules = {module_of(path) for path in sources()}
    missing = []
    for path in sources(*(f"tests/unit/{package}" for package in PACKAGES)):
        room = name(path.parent).removeprefix("tests/unit/").replace("/", ".")
        subject = path.stem.removeprefix("test_")
        if path.stem.startswith("test_") and f"{room}.{subject}" not in modules:
            missing.append(name(path))
    return missing


def product_lines() -> int:
    """Lines of the product's Python files, with blank lines and comments."""
    return sum(len(path.read_text().splitlines()) for path in sources())


def code_lines() -> int:
    """Lines of the product that are neither blank, nor a comment, nor part of a docstring."""
    total = 0
    for path in sources():
        documentation: set[int] = set()
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                documentation.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for number, line in enumerate(path.read_text().splitlines(), 1):
            total += bool(line.strip()) and not line.lstrip().startswith("#") and number not in documentation
    return total


def main() -> None:
    rooms = {path.parent for path in sources()}
    longest = max(functions(), key=lambda function: 0 if function.is_kernel else function.lines)
    files = sorted(sources(), key=lambda path: -len(path.read_text().splitlines()))
    print(f"product lines                       {product_lines():6}")
    print(f"  without blanks and documentation  {code_lines():6}")
    print(f"files                               {len(files):6}")
    print(f"rooms (folders with modules)        {len(rooms):6}")
    print(f"upward imports                      {len(upward_imports()):6}")
    print(f"groups of modules in a cycle        {len(import_cycles()):6}")
    print(
        f"functions without docstring         {len(without_docstring()):6}   public, over {SHORT_FUNCTION_LINES} lines"
    )
    print(f"longest file                        {len(files[0].read_text().splitlines()):6}   {name(files[0])}")
    print(f"longest function                    {longest.lines:6}   {longest.place} {longest.name}")
    print(f"test files that mirror no module    {len(tests_without_module()):6}")


if __name__ == "__main__":
    main()
