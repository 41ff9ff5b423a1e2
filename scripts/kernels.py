"""Count the kernels that one training iteration launches, by phase, in the program that XLA compiles for it.

    python scripts/kernels.py --settings '{"num_envs": 64}' --agents 64

On a GPU the time of an iteration with small networks is expected to follow these numbers. No GPU is needed: with
the CUDA plugin of JAX installed and `--target`, XLA compiles for the card that a file describes, such as
xla/backends/gpu/target_config/specs/h100_sxm.txtpb of XLA's sources; set JAX_PLATFORMS=cpu. A kernel counts as often as
its loop runs. A loop whose length depends on data counts as one turn. Launches are what the host submits: a command
buffer is one launch of several kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from trpo_jax import Config, init, train_step

# An operation belongs to the first phase with a function that it was traced in.
PHASES = {
    "rollout": {"rollout"},
    "value fit": {"fit_value"},
    "line search": {"backtracking_line_search", "parallel_line_search", "full_step"},
    "curvature": {"natural_gradient"},
    "gradient": {"surrogate_gradient"},
    "advantages": {"estimate"},
}
REST = "the rest"
ITERATIONS = 7  # of the program; one of them is counted
NO_KERNEL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
}
ROLES = "body|condition|to_apply|branch_computations|true_computation|false_computation"

Counts = Counter[str]


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a computation."""

    name: str
    opcode: str
    called: dict[str, list[str]]  # computations, by role: body, condition, to_apply, …
    turns: int | None  # of a loop, if known
    phase: str  # "": that of the loop around it, such as where the trace of a function is used again


@dataclasses.dataclass(frozen=True)
class Program:
    """An optimised program: its operations by computation, and the name of the first computation."""

    computations: dict[str, list[Operation]]
    entry: str

    def iteration(self) -> Operation:
        """The loop over iterations."""
        return next(o for o in self.computations[self.entry] if o.opcode == "while" and o.turns == ITERATIONS)


def parse(text: str) -> Program:
    """Read a program from the text of `compiled.as_text()`."""
    phases = _phases(text)
    computations: dict[str, list[Operation]] = {}
    entry = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            entry = found[2] if found[1] else entry
            operations = computations.setdefault(found[2], [])
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(", line):
            called = re.findall(
                r"(body|condition|to_apply|branch_computations|(?:true|false)_computation)=(\{[^}]*|%?[\w.\-]+)", line
            )
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            frame = re.search(r"stack_frame_id=(\d+)", line)
            operations.append(
                Operation(
                    name=found[1],
                    opcode=found[2],
                    called={role: re.findall(r"[\w.\-]+", names) for role, names in called},
                    turns=int(turns[1]) if turns else None,
                    phase=phases[frame[1]] if frame else "",
                )
            )
    return Program(computations, entry)


def _phases(text: str) -> dict[str, str]:
    """Phases of the stack frames that the head of a program lists."""

    def table(title: str, pattern: str) -> dict[str, tuple[str, ...]]:
        section = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        return {
            row[0]: row[1:] for row in re.findall(rf"^(\d+) {pattern}", section[1] if section else "", re.MULTILINE)
        }

    names = table("FunctionNames", '"(.*)"')
    locations = table("FileLocations", r".*function_name_id=(\d+)")
    frames = table("StackFrames", r"\{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
    if any(frame == parent for frame, (_, parent) in frames.items()):  # numbered from another start than the rows are
        frames = {frame: (location, str(int(parent) - 1)) for frame, (location, parent) in frames.items()}

    def phase(frame: str) -> str:
        functions: set[str] = set()
        while frame in frames:
            location, frame = frames[frame]
            functions |= set(names[locations[location][0]][0].split("."))
        return next((phase for phase, within in PHASES.items() if within & functions), "")

    return {frame: phase(frame) for frame in frames}


def kernels(program: Program) -> Counts:
    """Count the kernels of one iteration by phase."""
    return _inside(program, program.iteration().called["body"][0], REST)


def _inside(program: Program, computation: str, outer: str) -> Counts:
    counts: Counts = Counter()
    for operation in program.computations[computation]:
        phase = operation.phase or outer
        parts = {role: [_inside(program, name, phase) for name in names] for role, names in operation.called.items()}
        if operation.opcode == "while":
            condition = Counter() if operation.turns else parts["condition"][0]  # else the host counts
            for name, number in (parts["body"][0] + condition).items():
                counts[name] += number * (operation.turns or 1)
        elif operation.opcode == "conditional":
            branches = [branch for role in parts.values() for branch in role]
            largest = max(branches, key=Counter.total)
            counts += largest
        elif operation.opcode == "call":
            counts += parts["to_apply"][0]
        elif operation.opcode not in NO_KERNEL and not operation.opcode.endswith("-done"):
            counts[phase] += 1
    return counts


def launches(program: Program, thunks: str, metadata: str) -> Counts:
    """Count what the host submits in one iteration by phase, from XLA's list of thunks and their names."""
    operations = {o.name: o for operations in program.computations.values() for o in operations}
    names = {number: name for name, number in re.findall(r'annotation: "(.*)"\s+thunk_id: (\d+)', metadata)}
    counts: Counts = Counter()
    # Open thunks around a line: (indentation, how often it runs, its phase, whether what is inside counts).
    around: list[tuple[int, int, str, bool]] = [(-1, 0, REST, True)]
    counted_by_host = False  # the turns of the loop whose condition is being read
    for line in thunks.splitlines():
        if line.strip() == "body:":
            counted_by_host = False
        found = re.match(r"( *)(\d+): k(\w+)", line)
        if not found or counted_by_host:
            continue
        indent, number, kind = len(found[1]), str(int(found[2])), found[3]
        while around[-1][0] >= indent:
            around.pop()
        _, turns, outer, counted = around[-1]
        operation = operations.get(names.get(number, ""))
        phase = (operation and operation.phase) or outer
        if kind == "While" and operation is not None:
            counted_by_host = operation.turns is not None
            if operation == program.iteration():
                around.append((indent, 1, REST, True))
            else:
                around.append((indent, turns * (operation.turns or 1), phase, counted))
        elif kind == "CommandBuffer":
            around.append((indent, -turns, outer, counted))  # counted by the phase of its first kernel
        elif turns < 0:
            counts[phase] += -turns
            around[-1] = (around[-1][0], 0, outer, False)
        elif kind not in ("Conditional", "Sequential"):
            counts[phase] += turns if counted else 0
            around.append((indent, 0, phase, False))
    return counts


def compile_iterations(config: Config, agents: int | None, target: str | None, folder: str) -> Any:
    """Compile iterations of one agent or several for this machine, or for a card, which leaves thunks in `folder`."""

    def run(config: Config, states: Any) -> Any:
        step = train_step if agents is None else jax.vmap(train_step, in_axes=(None, 0))
        return jax.lax.scan(lambda states, _: step(config, states), states, None, length=ITERATIONS)

    start = init if agents is None else jax.vmap(init, in_axes=(None, 0))
    keys = jax.eval_shape(lambda: jax.random.key(0) if agents is None else jax.random.split(jax.random.key(0), agents))
    arguments = config, jax.eval_shape(start, config, keys)
    options: dict[str, Any] = {}
    if target is not None:
        from jax.experimental.topologies import get_topology_desc

        described = Path(target).read_text()
        card = get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=described)
        on_card = jax.sharding.SingleDeviceSharding(card.devices[0])
        shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=on_card)  # noqa: E731
        arguments = jax.tree.map(shape, arguments)
        options = {"xla_gpu_autotune_level": 0, "xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    depth = "jax_traceback_in_locations_limit"
    before = jax.config.values[depth]
    jax.config.update(depth, -1)  # the function of a phase is far out
    try:
        return jax.jit(run, donate_argnums=1).lower(*arguments).compile(compiler_options=options)
    finally:
        jax.config.update(depth, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=json.loads, default={}, help="settings of Config, in JSON")
    parser.add_argument("--agents", type=int, help="agents side by side in the program")
    parser.add_argument("--target", help="description of a card to compile for (a GpuTargetConfig in text form)")
    chosen = parser.parse_args()
    if chosen.target:
        jax.default_backend = lambda: "gpu"  # the library asks this which form a program is to have
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_iterations(Config(**chosen.settings), chosen.agents, chosen.target, folder)
        program = parse(compiled.as_text())
        columns = {"kernels": kernels(program)}
        for dumped in Path(folder).glob("*jit_run.thunk_sequence_after_thunk_passes.txt"):
            metadata = dumped.with_name(dumped.name.replace("thunk_sequence_after_thunk_passes", "thunk_metadata"))
            columns["launches"] = launches(program, dumped.read_text(), metadata.read_text())
    print(f"| phase | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for phase in (*PHASES, REST):
        print(f"| {phase} | {' | '.join(f'{column[phase]:,}' for column in columns.values())} |")
    print(f"| all | {' | '.join(f'{column.total():,}' for column in columns.values())} |")
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(
        f"\n{held / 2**20:,.1f} MiB of arguments and results, {memory.temp_size_in_bytes / 2**20:,.1f} MiB of scratch"
    )


if __name__ == "__main__":
    main()
