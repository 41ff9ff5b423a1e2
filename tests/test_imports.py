"""Imports point one way, cost nothing before use, and every public name is there and documented."""

import ast
import inspect
from pathlib import Path

import pytest

import trpo_jax
import trpo_jax.theory

PACKAGE = Path(trpo_jax.__file__).parent

# A module may import modules of its own layer and of lower ones.
LAYERS = {
    "": 0,  # the package itself, whose names load on first use
    "backend": 0,
    "config": 0,
    "env_args": 0,
    "fields": 0,
    "sentences": 0,
    "validation": 0,
    "files": 0,
    "presets": 0,
    "settings": 0,
    "steps": 0,
    "algorithms": 1,
    "config_pytree": 1,
    "environments": 1,
    "theory": 1,
    "networks": 2,
    "training": 3,
    "deployment": 4,
    "playing": 4,
    "videos": 4,
    "runs": 4,
    "benchmarks": 5,
    "sweeps": 5,
    "cli": 6,
    "__main__": 6,
}
ALONE = {"steps"}  # imports nothing of the package but itself and what differs by backend


def layer(module: str) -> str:
    return module.removeprefix("trpo_jax").lstrip(".").split(".")[0]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    tree = ast.parse(path.read_text())
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    for node in set(ast.walk(tree)) - for_types:  # what only a type checker imports is no import
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"trpo_jax.{alias.name}" for alias in node.names if node.module == "trpo_jax"]
            modules |= {name for name in inside if layer(name) in LAYERS} or {node.module}
    return modules


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return  # the list of public names looks at everything, lazily
    own = parts[0]
    for module in imported_modules(path):
        if not module.startswith("trpo_jax"):
            continue
        other = layer(module)
        assert LAYERS[other] <= LAYERS[own], f"{path} imports upwards: {module}"
        assert own not in ALONE or other in (own, "backend"), f"{path} must stand alone, but imports {module}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_modules_of_networks_import_a_network_library(path):
    libraries = {module.split(".")[0] for module in imported_modules(path)}
    assert path == PACKAGE / "networks" / "modules.py" or not libraries & {"flax", "haiku", "equinox"}


@pytest.mark.parametrize("module", ["trpo_jax", "trpo_jax.cli", "trpo_jax.config", "trpo_jax.cli.displays"])
def test_import_needs_no_jax(python, module):
    code = f"import sys, {module}; print(sorted({{'jax', 'numpy', 'gymnax', 'flax'}} & set(sys.modules)))"
    assert python("-c", code).stdout.strip() == "[]"


def test_update_steps_load_without_environments_and_networks(python):
    names = "trpo_update, gae, conjugate_gradient, Categorical, fisher_vector_product, parallel_line_search, Config"
    heavy = "sorted({'gymnax', 'flax', 'matplotlib'} & set(sys.modules))"
    code = f"import sys; from trpo_jax import {names}; print({heavy})"
    assert python("-c", code).stdout.strip() == "[]"


def test_public_names_are_one_list():
    # `_HOME` feeds __all__ and __getattr__; the type checker reads the imports above it. They must not drift apart.
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for block in source.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"trpo_jax.{home}" for name, home in trpo_jax._HOME.items()}


@pytest.mark.parametrize("name", trpo_jax.__all__)
def test_public_name_is_documented(name):
    value = getattr(trpo_jax, name)
    assert inspect.getdoc(value), f"{name} has no docstring"


PUBLIC = {"trpo_jax": {*trpo_jax.__all__, "theory"}, "trpo_jax.theory": set(trpo_jax.theory.__all__)}
OUTSIDE = [path for folder in ("experiments", "scripts") for path in sorted((PACKAGE.parent / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_experiments_and_scripts_use_public_names_alone(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("trpo_jax"):
            assert {alias.name for alias in node.names} <= PUBLIC[node.module]
        elif isinstance(node, ast.Import):
            assert all(alias.name in PUBLIC for alias in node.names if alias.name.startswith("trpo_jax"))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trpo_jax":
            assert node.attr in PUBLIC["trpo_jax"]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trainn'"):
        _ = trpo_jax.trainn
