"""The house: imports go down, scripts start fast, every flag is used, signatures have types."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

# Imports between folders only go down this list.
ORDER = (
    "chat",
    "evaluation",
    "training",
    "selection",
    "generation",
    "checkpoints",
    "gguf",
    "data",
    "text",
    "model",
    "common",
)
# Folders that are side by side in docs/house.md.
APART = [
    {"chat", "evaluation"},
    {"chat", "training"},
    {"evaluation", "training"},
    {"generation", "selection"},
    {"generation", "training"},
    {"selection", "training"},
    {"data", "gguf"},
    {"model", "text"},
]
SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted((ROOT / "minisft").rglob("*.py"))


def imported(path):
    """The modules of minisft that a file imports, anywhere in it, with dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minisft."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("minisft."))


def folder_of(path):
    """The folder of minisft that a module is in; None for minisft/__init__.py."""
    return path.parts[-2] if path.parts[-2] != "minisft" else None


def test_every_folder_has_a_place_in_the_order():
    assert {folder_of(path) for path in MODULES} - {None} == set(ORDER)


def test_imports_between_folders_go_down():
    wrong = []
    for path in MODULES:
        home = folder_of(path)
        for name in imported(path):
            other = name.split(".")[1]
            if home and (ORDER.index(other) < ORDER.index(home) or {home, other} in APART):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


# The packages of requirements.txt and the extras, and two that come with tokenizers and gradio.
RUNTIME = [ROOT / "requirements.txt"]
RUNTIME += [ROOT / "requirements" / f"{extra}.txt" for extra in ("plot", "eval", "web", "data")]
LIBRARIES = {"huggingface_hub", "starlette", "yaml"} | {
    name.replace("-", "_")
    for path in RUNTIME
    for name in re.findall(r"^[\w-]+", path.read_text(encoding="utf-8"), re.MULTILINE)
}


def test_only_required_libraries_are_imported():
    allowed = {"minisft", *LIBRARIES, *sys.stdlib_module_names}
    for path in [*SCRIPTS, *MODULES]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path


def flags_of(help_text):
    return set(re.findall(r"^  (?:-\w, )?--(\w+)", help_text, re.MULTILINE)) - {"help"}


PARSING = ("parse_options", "check_options", "parse_choice_options", "parse_compare_options")


def used_options(trees):
    """The options that code uses, beyond storing and checking them.

    `options.name` and `run.options.name` are looked for, and `getattr(options, flag)` in functions
    that spell the name. Reads in parse_options and check_options do not count, nor do variables or
    attributes that nothing reads.
    """
    read, used, stored = set(), set(), []
    for tree in trees:
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                if not is_option(node):
                    read.add(node.id if isinstance(node, ast.Name) else node.attr)
                elif not in_function(node, parents, PARSING):
                    targets = where_stored(node, parents)
                    if targets is None:
                        used.add(node.attr)
                    else:
                        stored.append((node.attr, targets))
            elif isinstance(node, ast.FunctionDef) and any(map(gets_by_name, ast.walk(node))):
                used |= {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
    return used | {name for name, targets in stored if targets & read}


def is_option(node):
    base = node.value if isinstance(node, ast.Attribute) else None
    return getattr(base, "id", getattr(base, "attr", None)) == "options"


def gets_by_name(node):
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "id", None) == "getattr"
        and getattr(node.args[0], "id", None) == "options"
    )


def in_function(node, parents, names):
    while node := parents.get(node):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            return True
    return False


def where_stored(node, parents):
    """The names under which an expression is only stored; None if the code uses it."""
    parent = parents[node]
    if isinstance(parent, ast.Expr):
        return set()
    position = None
    if isinstance(parent, ast.Tuple):
        parent, position = parents[parent], parent.elts.index(node)
    if not isinstance(parent, ast.Assign):
        return None
    targets = parent.targets
    if position is not None and isinstance(targets[0], ast.Tuple):
        targets = [targets[0].elts[position]]
    return {getattr(target, "id", getattr(target, "attr", None)) for target in targets}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def reached(path):
    """A script and the modules it imports, directly or through others."""
    found, new = {path}, [path]
    while new:
        paths = [ROOT / f"{name.replace('.', '/')}.py" for name in imported(new.pop())]
        new += [module for module in paths if module.exists() and module not in found]
        found |= set(new)
    return found


# Options that OptionParser and run_script() handle; their tests are in test_options.py.
OF_THE_PARSER = {"config", "debug"}
COMMANDS = SCRIPTS + [path for path in MODULES if path.stem == "__main__"]
# Modules that take a second or more to import. `--help` should not wait for them.
SLOW = {"torch", "numpy", "tokenizers", "sentencepiece", "safetensors", "gguf"}
# A script whose first word chooses the parser, with a word for each of them.
FIRST_WORDS = {"eval": ["mmlu", "compare"]}


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.stem.strip("_"))
def test_help_loads_little_and_every_flag_is_used(script):
    words, flags = ["-m", f"minisft.{folder_of(script)}"] if script in MODULES else [script], set()
    for first in FIRST_WORDS.get(script.stem, []) or [None]:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *words, *filter(None, [first]), "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        loaded = set(re.findall(r"\| +(\w+)", done.stderr))
        assert "argparse" in loaded
        if script in SCRIPTS:
            assert not loaded & SLOW
        flags |= flags_of(done.stdout)
    assert flags > OF_THE_PARSER
    assert flags - OF_THE_PARSER <= used_options(map(parsed, reached(script)))


@pytest.mark.parametrize(
    ("code", "is_used"),
    [
        ("train(options.speed)", True),
        ("if run.options.speed: train()", True),
        ("self.speed = options.speed\nprint(self.speed)", True),
        ("def f():\n    for flag in ('speed', 'x'): print(getattr(options, flag))", True),
        ("self.speed, self.x = options.speed, options.x\nprint(self.x)", False),
        ("self.speed = options.speed", False),
        ("self.speed = options.speed\nprint(options.x, self.x)", False),
        ("options.speed", False),
        ("options.speed = 3", False),
        ("print('speed', 'options.speed')  # options.speed", False),
        ("NAMES = {'speed'}", False),
        ("print(wheel.speed)", False),
        ("def check_options(options):\n    if options.speed < 0: raise ValueError", False),
    ],
)
def test_an_option_that_nothing_uses_is_found(code, is_used):
    assert ("speed" in used_options([ast.parse(code)])) == is_used


def functions(body, prefix=""):
    """(name, node) of every public function of a module and method of its public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_special = node.name.startswith("__") and node.name.endswith("__")
            if is_special or not node.name.startswith("_"):
                yield prefix + node.name, node


def missing_hints(source):
    """["function: argument", ...] without a type hint; "function: return" for the result.

    `self` and `cls` need none, nor does the result of `__init__`.
    """
    missing = []
    for name, node in functions(ast.parse(source).body):
        arguments = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            *filter(None, [node.args.vararg, node.args.kwarg]),
        ]
        missing += [
            f"{name}: {argument.arg}"
            for argument in arguments
            if argument.annotation is None and argument.arg not in ("self", "cls")
        ]
        if node.returns is None and node.name != "__init__":
            missing.append(f"{name}: return")
    return missing


@pytest.mark.parametrize("path", [*SCRIPTS, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_have_type_hints(path):
    assert not missing_hints(path.read_text(encoding="utf-8"))


def test_missing_type_hints_are_noticed():
    source = """
def complete(a: int, *b: int, c: str = "", **d: int) -> None: ...
def bad(a, *b, c: int, **d): ...
def _private(a): ...
class Public:
    def __init__(self, a: int): ...
    def __call__(self, a) -> int: ...
class _Private:
    def method(self, a): ...
"""
    assert missing_hints(source) == [
        "bad: a",
        "bad: b",
        "bad: d",
        "bad: return",
        "Public.__call__: a",
    ]


def test_files_that_are_not_python_are_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["minisft"]
    installed = {path for pattern in patterns for path in (ROOT / "minisft").glob(pattern)}
    others = [path for path in (ROOT / "minisft").rglob("*.*") if "__pycache__" not in path.parts]
    assert {path for path in others if path.suffix != ".py"} == installed


def test_no_long_files():
    others = [
        path for name in ("bench", "docs", "examples") for path in (ROOT / name).rglob("*.py")
    ]
    for path in [*SCRIPTS, *MODULES, *others]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path
