"""Mutation testing: change one thing at a time in the code that learns; a change that no test notices is a gap.

pip install cosmic-ray
python scripts/mutants.py scripts/mutants.jsonl --count 300   # adds to the results; run it again to continue
python scripts/mutants.py scripts/mutants.jsonl --again       # tries the missed ones again
python scripts/mutants.py scripts/mutants.jsonl --summary     # the share that is caught, and the missed ones

A missed change without a visible effect gets its reason by hand, as "equivalent".

The changes are Cosmic Ray's (another operator, comparison, number, truth value, condition) and four of our own, which
look more like slips: an operand, an argument or a condition left out, and a reduction replaced by a similar one. Each
is made in a copy of the repository and tried on the quick tests, nearest first, up to the first that fails. A test
process is a fork of this one, which has imported slow modules but not started JAX; so most take a few seconds.
"""

import argparse
import ast
import collections
import dataclasses
import difflib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parso.python.tree as tree
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("steps/*.py", "training/*.py", "environments/base.py", "environments/wrappers.py", "sweeps/iqm.py")
ASIDE = ("memory.py", "checkpoints.py")  # estimates and files, without learning
# After the tests that are nearest to a file come these, which together run every part of an iteration.
ALL_TESTS = [
    *("steps", "training", "environments/test_base.py", "environments/test_wrappers.py"),
    *("test_networks.py", "sweeps/test_bits.py", "sweeps/test_reports.py"),
]
# Traces every branch of an iteration in seconds without compiling: finds whatever cannot run at all.
TRACED = "tests/training/test_loop.py::test_every_static_setting_changes_the_program"
_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
HANGS = 180  # seconds of CPU time after which a test counts as hanging
SLOW_TESTS = ("test_update_properties.py", "test_checkpoints.py")  # last among equals

# Of Cosmic Ray's replacements of one operator by any other, those that could be a slip.
REPLACEMENTS = {
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Mul_Add", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul"),
    *("BitOr_BitAnd", "BitAnd_BitOr", "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_Gt", "Gt_Lt"),
    *("LtE_GtE", "GtE_LtE", "Is_IsNot", "IsNot_Is", "Delete_USub", "Delete_Invert", "Delete_Not"),
}
PLAIN = {"AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"}
PLAIN |= {"NumberReplacer", "ZeroIterationForLoop"}

NOT_BEHAVIOUR = {"import_name", "import_from", "annassign", "raise_stmt", "assert_stmt", "decorator", "tfpdef"}
INSTEAD = {"where": (1, 2), "minimum": (0,), "maximum": (0,), "clip": (0,), "abs": (0,), "sqrt": (0,), "exp": (0,)}
INSTEAD |= {"stop_gradient": (0,), "min": (0, 1), "max": (0, 1), "nan_to_num": (0,), "cond": (1, 2), "fold_in": (0,)}
NEIGHBOURS = {"mean": "sum", "sum": "mean", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
NEIGHBOURS |= {"argmax": "argmin", "zeros": "ones", "zeros_like": "ones_like", "min": "max", "max": "min"}


class LeaveOutOperand(Operator):
    """`a + b` becomes `a`, or `b`."""

    KINDS = ("arith_expr", "term", "expr", "and_expr", "and_test", "or_test")

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type in self.KINDS:
            yield from [(node.start_pos, node.end_pos)] * 2

    def mutate(self, node: Any, index: int) -> Any:
        rest = node.children[2:] if index else node.children[:-2]
        return rest[0] if len(rest) == 1 else tree.PythonNode(node.type, rest)

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return ()


class LeaveOutFunction(Operator):
    """`where(c, a, b)` becomes `a`, or `b`; `minimum(a, b)` becomes `a`."""

    @staticmethod
    def _arguments(node: Any) -> list[Any]:
        if node.type not in ("atom_expr", "power") or len(node.children) < 2 or node.children[-1].type != "trailer":
            return []
        trailer, name = node.children[-1], node.children[-2]
        name = name.children[-1] if name.type == "trailer" else name
        if trailer.children[0].value != "(" or len(trailer.children) < 3 or getattr(name, "value", "") not in INSTEAD:
            return []
        inside = trailer.children[1]
        arguments = inside.children[::2] if inside.type == "arglist" else [inside]
        return [arguments[place] for place in INSTEAD[name.value] if place < len(arguments)]

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        yield from [(node.start_pos, node.end_pos)] * len(self._arguments(node))

    def mutate(self, node: Any, index: int) -> Any:
        open_, close = (tree.Operator(bracket, node.start_pos) for bracket in "()")
        open_.prefix = node.get_first_leaf().prefix
        return tree.PythonNode("atom", [open_, self._arguments(node)[index], close])

    examples = LeaveOutOperand.examples


class LeaveOutKeyword(Operator):
    """`f(a, b=c)` becomes `f(a)`."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "arglist":
            yield from ((part.start_pos, part.end_pos) for part in node.children if part.type == "argument")

    def mutate(self, node: Any, index: int) -> Any:
        place = [i for i, part in enumerate(node.children) if part.type == "argument"][index]
        cut = slice(place, place + 2) if place == 0 else slice(place - 1, place + 1)
        del node.children[cut]
        return node

    examples = LeaveOutOperand.examples


class Neighbour(Operator):
    """`mean` becomes `sum`, `any` becomes `all`, …"""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        called = node.type == "name" and node.parent.type == "trailer" and node.parent.children[0].value == "."
        if called and node.value in NEIGHBOURS:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return tree.Name(NEIGHBOURS[node.value], node.start_pos, prefix=node.prefix)

    examples = LeaveOutOperand.examples


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change to one file."""

    path: str
    line: int
    operator: str
    change: str
    code: str


def operators() -> dict[str, Operator]:
    """Every operator that the drill uses, by name."""
    own = {cls.__name__: cls() for cls in (LeaveOutOperand, LeaveOutFunction, LeaveOutKeyword, Neighbour)}
    for name in operator_names():
        short = name.removeprefix("core/")
        if short in PLAIN or (short.startswith("Replace") and short.partition("Operator_")[2] in REPLACEMENTS):
            own[short] = get_operator(name)()
    return own


def says_nothing(node: Any) -> bool:
    """Whether a node is an import, an annotation, an error, a check of shapes, or a choice of speed for a machine."""
    if node.parent.type in ("parameters", "param"):  # the bare * of a signature
        return node.type == "operator"
    while node.parent is not None:
        parent = node.parent
        returns = parent.type == "funcdef" and "->" in [getattr(child, "value", None) for child in parent.children]
        if returns and node is parent.annotation:
            return True
        shape_check = parent.type in ("atom_expr", "power") and parent.get_code().strip().startswith("chex.assert")
        text = parent.get_code().strip() if parent.type in ("comparison", "expr_stmt") else ""
        speed = "platform()" in text or re.match(r"_[A-Z_, ]+ =", text)
        if parent.type in NOT_BEHAVIOUR or shape_check or speed:
            return True
        node = parent
    return False


def places_of(path: Path) -> Iterator[tuple[int, str, int]]:
    """The places where one file can be changed: line, operator, and the number of the operator's occurrence."""
    nodes = list(ast_nodes(get_ast(path.read_text())))
    for name, operator in operators().items():
        occurrence = 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not says_nothing(node):
                    yield start[0], name, occurrence
                occurrence += 1


def mutate(path: Path, line: int, operator: str, occurrence: int) -> Mutant | None:
    """The change at one place; None if the result is not a program, or the same one."""
    source = path.read_text()
    try:
        code = mutate_code(source, operators()[operator], occurrence)
        if ast.unparse(ast.parse(code)) == ast.unparse(ast.parse(source)):
            return None
    except (SyntaxError, ZeroDivisionError):
        return None
    return Mutant(str(path.relative_to(ROOT)), line, operator, difference(source, code), code)


def difference(old: str, new: str) -> str:
    """The lines that change, without context."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def sample(count: int, seed: int) -> list[Mutant]:
    """Mutants in random order, at most one per line and kind of change, so that no expression counts for many."""
    paths = sorted(path for pattern in SOURCES for path in (ROOT / "trpo_jax").glob(pattern) if path.name not in ASIDE)
    groups = collections.defaultdict(list)
    for path in paths:
        for line, operator, occurrence in places_of(path):
            groups[path, line, operator.partition("_")[0]].append((path, line, operator, occurrence))
    print(f"{sum(map(len, groups.values()))} changes at {len(groups)} places in {len(paths)} files", flush=True)
    generator = random.Random(seed)
    chosen = [generator.choice(group) for group in groups.values()]
    generator.shuffle(chosen)
    return [found for place in chosen[:count] if (found := mutate(*place))]


def found_again(records: list[dict[str, Any]]) -> list[Mutant]:
    """The mutants of earlier records, in the present code; without those whose line is no longer there."""
    mutants = []
    for path in sorted({record["path"] for record in records}):
        changes = [record["change"] for record in records if record["path"] == path]
        every = (mutate(ROOT / path, *place) for place in places_of(ROOT / path))
        mutants += [one for one in every if one and one.change in changes]
    print(f"{len(mutants)} of {len(records)} are still there", flush=True)
    return mutants


def tests_for(path: str) -> list[list[str]]:
    """Tests in parts, nearest first: of the same name, a cheap one, those that import the module, and the rest."""
    module, tests = Path(path).with_suffix(""), ROOT / "tests"

    names = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, _DEFINITIONS)}

    def distance(test: Path) -> int:
        same_folder = test.parent.name in (module.parent.name, "tests")
        if same_folder and test.stem == f"test_{module.name}":
            return 0
        imports = [node for node in ast.parse(test.read_text()).body if isinstance(node, ast.ImportFrom)]
        return 1 if names & {alias.name for node in imports for alias in node.names} else 2

    everything = [file for name in ALL_TESTS for file in sorted((tests / name).rglob("test_*.py")) or [tests / name]]
    everything += [test for test in sorted(tests.rglob("test_*.py")) if test not in everything and distance(test) < 2]
    everything.sort(key=lambda test: (test.parent.name != module.parent.name, test.name in SLOW_TESTS))
    parts = [[str(test.relative_to(ROOT)) for test in everything if distance(test) == far] for far in range(3)]
    parts.insert(0 if module.parent.name == "training" else len(parts) - 1, [TRACED])
    return [part for part in parts if part]


class FirstFailure:
    """A pytest plugin that writes down which test failed first, and gives up after so many seconds of CPU time."""

    def __init__(self, report: Path, seconds: float) -> None:
        self.report, self.seconds = report, seconds

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.report.exists():
            self.report.write_text(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.report.exists():
            self.report.write_text(f"import of {report.nodeid}")

    def pytest_runtest_teardown(self, item: Any) -> None:
        if time.process_time() > self.seconds:
            item.session.shouldstop = "enough time spent on this mutant"


def run_tests(folder: Path, tests: list[str], report: Path, seconds: float) -> tuple[int, float]:
    """Run tests in a fork of this process; return the exit status, negative for a signal, and the seconds left."""
    child = os.fork()
    if child:
        _, status, usage = os.wait4(child, 0)
        return os.waitstatus_to_exitcode(status), seconds - usage.ru_utime - usage.ru_stime
    try:
        os.setsid()
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        log = os.open(report.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + HANGS,) * 2)
        import pytest

        options = ["-x", "-q", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "--no-header"]
        os._exit(int(pytest.main([*options, *tests], plugins=[FirstFailure(report, seconds)])))
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def try_mutant(mutant: Mutant, folder: Path, seconds: float) -> dict[str, Any]:
    """Run the tests on a mutant; return a record of the result."""
    report, file = folder / "first_failure", folder / mutant.path
    report.unlink(missing_ok=True)
    original, start = file.read_text(), time.monotonic()
    file.write_text(mutant.code)
    caught_by = None
    for part in tests_for(mutant.path):
        status, seconds = run_tests(folder, part, report, seconds)
        if report.exists():
            caught_by = report.read_text()
        elif status in (-signal.SIGXCPU, -signal.SIGKILL):
            caught_by = "a limit of time"
        elif status not in (0, 2, 5):  # passed, out of time, no tests
            caught_by = f"exit status {status}"
        if caught_by or seconds <= 0:
            break
    file.write_text(original)
    record = {key: value for key, value in dataclasses.asdict(mutant).items() if key != "code"}
    return {**record, "caught_by": caught_by, "seconds": round(time.monotonic() - start, 1)}


def summarise(records: list[dict[str, Any]]) -> None:
    """Print the share that was caught, by file and in total, and every missed change."""
    equivalent = [record for record in records if record.get("equivalent")]
    for path in sorted({record["path"] for record in records}):
        of_file = [record for record in records if record["path"] == path]
        caught = sum(record["caught_by"] is not None for record in of_file)
        print(f"{path:44} {caught:4} of {len(of_file):4}")
    caught = sum(record["caught_by"] is not None for record in records)
    print(f"caught {caught} of {len(records)}; {len(equivalent)} of the rest change nothing that can be seen")
    for record in records:
        if record["caught_by"] is None:
            print(f"\n{record['path']}:{record['line']} {record['operator']} {record.get('equivalent', 'MISSED')}")
            print(record["change"])


def warm_up(programs: Path) -> None:
    """Import slow modules without starting JAX's backend, whose threads a fork would lose."""
    sys.dont_write_bytecode = True  # a mutant of the same size in the same second would be taken for the last one
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs))  # most programs stay as they were
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    import chex  # noqa: F401
    import flax.linen  # noqa: F401
    import jax.experimental
    import optax  # noqa: F401
    import scipy.optimize  # noqa: F401

    assert not jax._src.xla_bridge.backends_are_initialized()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON lines, one per mutant")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a path or a part of one: only mutants of these files")
    parser.add_argument("--seconds", type=float, default=40, help="CPU time to spend on the tests of a mutant")
    parser.add_argument("--again", action="store_true", help="try the missed ones again")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    records = [json.loads(line) for line in lines]
    if options.summary:
        return summarise(records)
    missed = [record for record in records if record["caught_by"] is None and "equivalent" not in record]
    if options.again:
        todo = found_again(missed)
    else:
        done = {(record["path"], record["line"], record["change"]) for record in records}
        mutants = (mutant for mutant in sample(options.count, options.seed) if options.only in mutant.path)
        todo = [mutant for mutant in mutants if (mutant.path, mutant.line, mutant.change) not in done]
    with tempfile.TemporaryDirectory(prefix="mutants_") as scratch:
        folder = Path(scratch) / "copy"
        ignore = shutil.ignore_patterns("__pycache__", ".*", "experiments", "runs")
        shutil.copytree(ROOT, folder, ignore=ignore)
        warm_up(Path(scratch) / "programs")
        for mutant in todo:
            record = try_mutant(mutant, folder, options.seconds)
            records = [one for one in records if (one["path"], one["change"]) != (mutant.path, mutant.change)] + [
                record
            ]
            options.results.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
            place = f"{mutant.path}:{mutant.line}"
            print(f"{record['seconds']:6} s  {place}  {record['caught_by'] or 'MISSED'}", flush=True)


if __name__ == "__main__":
    main()
