"""The rules of the design that a machine can hold: who imports whom, what is never executed, what must be owned."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from quartet.runtime import control
from quartet.runtime.launcher.launch import SERVICES
from quartet.runtime.settings import flags
from quartet.scheduler_service.control.handlers import HANDLERS
from tests import structure
from tests.structure import PACKAGES, ROOT, imported, imports, name, sources, tree

SERVICE_PACKAGES = {"tokenizer_service", "scheduler_service", "detokenizer_service", "http_gateway"}
HEAVY = {"torch", "transformers", "triton", "numpy"}

# directory or file → what it must not import: modules by prefix
FORBIDDEN = {
    "runtime": {*HEAVY, *SERVICE_PACKAGES, "kernels", "starlette", "uvicorn"},
    "tokenizer_service": {"torch", "zmq", "kernels", "starlette", *SERVICE_PACKAGES - {"tokenizer_service"}},
    "detokenizer_service": {"torch", "zmq", "kernels", "starlette", *SERVICE_PACKAGES - {"detokenizer_service"}},
    "http_gateway": {*HEAVY, "tokenizers", "zmq", "kernels", *SERVICE_PACKAGES - {"http_gateway"}},
    "scheduler_service": {"zmq", "starlette", "uvicorn", *SERVICE_PACKAGES - {"scheduler_service"}},
    "scheduler_service/model": {
        "scheduler_service.core",
        "runtime.sockets",
        "runtime.control",
        "runtime.service",
    },
    "kernels": {*SERVICE_PACKAGES, "runtime", "transformers", "zmq"},
}
# directory → all it may import besides the standard library
ALLOWED = {
    "scheduler_service/core": {
        "runtime.messages",
        "runtime.errors",
        "runtime.control",
        "runtime.vocabulary",
        "scheduler_service.core",
    },
    "kernels": {"torch", "triton", "kernels"},
}
LAZY = {  # directory → modules that it may import inside functions only
    "runtime": ("tokenizers", "yaml", "huggingface_hub"),
    "tokenizer_service": ("transformers",),
    "detokenizer_service": ("transformers",),
}
ZMQ_OWNER = "runtime/sockets.py"

ABOUT_SEVERAL_MODULES = {
    "tests/unit/scheduler_service/execution/test_constrained_drafts.py",
    "tests/unit/scheduler_service/execution/test_constrained_draws.py",
    "tests/unit/scheduler_service/core/test_planner_random.py",  # the whole core, on random requests
    "tests/unit/scheduler_service/core/test_forced_tokens.py",  # plans and what comes of them
    "tests/unit/scheduler_service/execution/test_forced_tokens.py",
    "tests/unit/scheduler_service/execution/test_thinking_budget.py",  # budgets, drafts, overlap, retractions
    "tests/unit/scheduler_service/core/test_speculation.py",
    "tests/unit/scheduler_service/grammar/test_thoughts.py",
    "tests/unit/kernels/cpu/native/test_tiles.py",  # products, and rows of tiles in C
    "tests/unit/kernels/cpu/native/test_parts.py",  # a header in C
    "tests/unit/kernels/cpu/native/test_quantized_rotated.py",  # quantized.py, and products of it in C
    "tests/unit/scheduler_service/test_overlap.py",
    "tests/unit/http_gateway/generation/test_sums.py",
    "tests/unit/http_gateway/openai/test_logprobs.py",
    "tests/unit/http_gateway/openai/test_others.py",
    "tests/unit/http_gateway/ring/test_recovery.py",
    "tests/unit/http_gateway/ring/test_several_schedulers.py",
    "tests/unit/runtime/launcher/test_ranks.py",
    "tests/unit/kernels/test_triton_suites.py",
}

PICKLE_READER = "scheduler_service.weights.convert_bin"
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {("torch", "load"), ("yaml", "load"), ("os", "system"), ("numpy", "load")}


def submodules(package: str, modules: set[str]) -> set[str]:
    """Those of the modules that lie in a package: `from runtime import errors` names both."""
    return {module for module in modules if within(module, package)}


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def test_no_room_imports_one_above_it():
    assert structure.upward_imports() == []


def test_no_modules_import_each_other_in_a_circle():
    assert structure.import_cycles() == []


def test_files_and_functions_are_read_in_one_sitting():
    assert structure.too_long() == []


def test_public_functions_of_some_length_say_what_they_do():
    assert structure.without_docstring() == []


def test_unit_tests_lie_where_their_modules_do():
    assert set(structure.tests_without_module()) == ABOUT_SEVERAL_MODULES


@pytest.mark.parametrize("place", FORBIDDEN)
def test_packages_import_nothing_that_is_forbidden_to_them(place):
    excepted = {"runtime": {ZMQ_OWNER}}.get(place, set())
    broken = [
        f"{name(path)} imports {module}"
        for path in sources(place)
        if name(path) not in excepted
        for module in imports(path)
        for prefix in FORBIDDEN[place]
        if within(module, prefix)
    ]
    assert broken == []


@pytest.mark.parametrize("place", ALLOWED)
def test_pure_packages_import_only_what_is_allowed_to_them(place):
    allowed = ALLOWED[place]
    broken = [
        f"{name(path)} imports {module}"
        for path in sources(place)
        for module in imports(path)
        if module.split(".")[0] not in sys.stdlib_module_names
        and not any(
            within(module, prefix) or prefix in imports(path) & submodules(module, allowed) for prefix in allowed
        )
    ]
    assert broken == []


@pytest.mark.parametrize("place", LAZY)
def test_what_is_slow_to_import_is_imported_only_when_it_is_needed(place):
    eager = [
        f"{name(path)} imports {module}"
        for path in sources(place)
        for module in imports(path, only_at_import=True)
        for prefix in LAZY[place]
        if within(module, prefix)
    ]
    assert eager == []


def test_the_room_of_another_api_is_known_to_the_route_table_alone():
    """It stands on the chat completions, and nothing stands on it."""
    room = "http_gateway.anthropic"
    users = {name(path) for path in sources("http_gateway") for module in imports(path) if within(module, room)}
    assert {user for user in users if not user.startswith("http_gateway/anthropic/")} == {"http_gateway/app.py"}


def test_zmq_is_known_to_one_file_only():
    owners = {name(path) for path in sources() for module in imports(path) if within(module, "zmq")}
    assert owners == {ZMQ_OWNER}


@pytest.mark.parametrize(
    "module",
    [
        "quartet.runtime.launcher.launch",
        "quartet.runtime.cli",
        *(service.module for service in SERVICES if service.role != "scheduler"),
    ],
)
def test_the_launcher_and_the_light_services_load_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; sys.exit(', '.join({{'torch', 'transformers'}} & sys.modules.keys()) or 0)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_our_modules_are_imported_by_one_root():
    """`kernels` and `runtime` are names of other people's distributions too."""
    broken = [
        f"{name(path)} imports {module}"
        for path in sources(*PACKAGES, "quartet", "tests", "deploy")
        for module in imported(path)
        if module.split(".")[0] in PACKAGES
    ]
    assert broken == []


def test_every_package_is_installed_under_that_root():
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name(path.parent).replace("/", ".") for path in sources() if path.name == "__init__.py"}
    without = {name(path.parent).replace("/", ".") for path in sources()} - folders
    assert without == set(), "folders with modules and no __init__.py"
    assert sorted(installed["packages"]) == sorted({"quartet"} | {f"quartet.{folder}" for folder in folders})
    assert installed["package-dir"] == {"quartet": "quartet"} | {f"quartet.{top}": top for top in PACKAGES}


def test_nothing_of_ours_can_execute_what_it_reads():
    """But for one short-lived process, which nobody imports."""
    broken = [f"{name(path)} imports the reader of pickles" for path in sources() if PICKLE_READER in imports(path)]
    for path in sources():
        unsafe = imports(path) & UNSAFE_MODULES
        broken += [f"{name(path)} imports {module}" for module in unsafe]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and (called := unsafe_call(node)) and not reads_tensors_only(path, node):
                broken.append(f"{name(path)}:{node.lineno} calls {called}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not is_false(node.value):
                broken.append(f"{name(path)}:{node.value.lineno} trusts remote code")
    assert broken == []


def reads_tensors_only(path: Path, node: ast.Call) -> bool:
    """A call of torch.load in the process that is there for it, and that builds tensors and nothing else."""
    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
    place = PICKLE_READER.replace(".", "/") + ".py"
    return unsafe_call(node) == "torch.load" and name(path) == place and options.get("weights_only") == "True"


def unsafe_call(node: ast.Call) -> str:
    """The name of a call that could execute its argument, or an empty string."""
    match node.func:
        case ast.Name(id=called) if called in UNSAFE_CALLS:
            return called
        case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if (owner, attribute) in UNSAFE_METHODS:
            return f"{owner}.{attribute}"
    return ""


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_services_are_named_by_string_and_exist():
    for service in SERVICES:
        path = service.module.removeprefix("quartet.").replace(".", "/") + ".py"
        assert (ROOT / path).is_file(), service.module


def test_every_command_has_a_handler():
    """In the scheduler's table, or in the code of a text service."""
    text_services = "\n".join(path.read_text() for path in sources("tokenizer_service", "detokenizer_service"))
    orphans = [
        command.__name__
        for command in control.COMMANDS
        if command not in HANDLERS and not re.search(rf"\b{command.__name__}\b", text_services)
    ]
    assert orphans == []


def test_every_flag_is_read_somewhere():
    """A flag that nothing reads would be accepted and ignored. (api names are read as `config.<name>`.)"""
    code = "\n".join(path.read_text() for path in sources())
    unread = [setting for setting in flags.settings() if not re.search(rf"\b(config|c|self)\.{setting}\b", code)]
    assert unread == []


def test_commands_of_the_readme_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"^\s*(?:\$ )?make ([\w-]+)", readme, re.MULTILINE))
    assert {"serve", "test"} <= named <= targets


def test_every_data_file_is_in_the_distribution():
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {
        path
        for package, patterns in globs.items()
        for glob in patterns
        for path in (ROOT / package.removeprefix("quartet.").replace(".", "/")).glob(glob)
    }
    data = {
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert sorted(map(name, data - shipped)) == []
