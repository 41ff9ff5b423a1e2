"""Kernels and launches are counted as often as they run, in the phase that they belong to."""

import kernels
from probes import Countdown, small_config

PROGRAM = """
FunctionNames
1 "rollout.<locals>.step"
2 "fit_value"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=1 function_name_id=2 line=1}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%few (p: f32[]) -> f32[] {
  ROOT %a.1 = f32[] add(%p, %p)
}

%many (p: f32[]) -> f32[] {
  %b.1 = f32[] add(%p, %p)
  ROOT %b.2 = f32[] add(%p, %b.1)
}

%inner (p: f32[]) -> f32[] {
  %c.1 = f32[] fusion(%p), metadata={stack_frame_id=2}
  ROOT %c.2 = f32[] fusion(%p), metadata={stack_frame_id=2}
}

%until (p: f32[]) -> pred[] {
  ROOT %d.1 = pred[] fusion(%p)
}

%body (p: f32[]) -> f32[] {
  %e.1 = f32[] constant(1)
  %e.2 = f32[] copy(%p), metadata={stack_frame_id=1}
  %e.3 = f32[] while(%p), condition=%until, body=%inner, backend_config={"known_trip_count":{"n":"10"}}
  %e.4 = f32[] while(%p), condition=%until, body=%few, metadata={stack_frame_id=1}
  ROOT %e.5 = f32[] conditional(%p), branch_computations={%few, %many}
}

ENTRY %main (p: f32[]) -> f32[] {
  ROOT %f.1 = f32[] while(%p), condition=%until, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}
"""
THUNKS = """000: kWhile
condition:
    001: kCustomKernel until
  body:
    002: kCopy e_2
    003: kWhile
condition:
        001: kCustomKernel until
      body:
        000: kCommandBuffer
            004: kCustomKernel c_1
            005: kCustomKernel c_2
"""
NAMES = {0: "f.1", 1: "d.1", 2: "e.2", 3: "e.3", 4: "c.1", 5: "c.2"}


def test_a_kernel_counts_as_often_as_its_loop_runs():
    counts = kernels.kernels(kernels.parse(PROGRAM))
    assert counts == {"rollout": 20, "value fit": 3, "the rest": 2}  # twice 10; a copy, one turn and its condition


def test_a_command_buffer_is_one_launch():
    metadata = "".join(f'annotation: "{name}"\n thunk_id: {number}\n' for number, name in NAMES.items())
    assert kernels.launches(kernels.parse(PROGRAM), THUNKS, metadata) == {"rollout": 10, "value fit": 1}


def test_a_compiled_program_has_all_phases(tmp_path):
    config = small_config(Countdown(), cg_iterations=3)
    program = kernels.parse(kernels.compile_iterations(config, None, None, str(tmp_path)).as_text())
    counts = kernels.kernels(program)
    assert set(counts) == {*kernels.PHASES, kernels.REST}
    assert counts["rollout"] >= config.num_steps * 3  # at least to act, step and record
