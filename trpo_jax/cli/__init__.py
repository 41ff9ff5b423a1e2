"""The command line: arguments, commands and output. Wrong input ends in one sentence.

JAX is imported when a command needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from trpo_jax.cli import commands, sweep_commands, train_commands
from trpo_jax.cli.arguments import check_arguments, flags_of, make_parser
from trpo_jax.sentences import UsageError, drop_output, first_line, nearest, say, shown
from trpo_jax.settings import trusting

_COMMANDS = {
    "train": train_commands.train,
    "evaluate": commands.evaluate,
    "resume": train_commands.resume,
    "play": commands.play,
    "export": commands.export,
    "sweep": sweep_commands.sweep,
    "report": sweep_commands.report,
    "compare": sweep_commands.compare,
    "tune": sweep_commands.tune,
    "benchmark": commands.benchmark,
    "check": commands.check,
    "envs": commands.envs,
    "presets": commands.presets,
}
_TOO_LARGE = "there is not enough memory; lower num_envs, num_steps or the number of agents"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `trpo-jax`.

    Returns:
      The exit status: 0; 1 if an agent of a run met a number that was not finite, or an environment fails its check;
      2 for bad input; 130 after Ctrl-C.
    """
    _prepare_streams()
    try:
        parser = make_parser()
        try:
            namespace, unknown = parser.parse_known_args(arguments)
        except SystemExit:  # --help, --version
            sys.stdout.flush()
            raise
        if unknown:
            flags = flags_of(parser, namespace.command)
            if unknown[0] in flags:
                raise UsageError(f"{unknown[0]} must stand after the command {namespace.command}, and before any --.")
            raise UsageError(f"unknown argument {unknown[0][:60]}{nearest(unknown[0], flags)}")
        check_arguments(namespace)
        with trusting(*getattr(namespace, "trust", ()), getattr(namespace, "env", None) or ""):
            status = _COMMANDS[namespace.command](namespace)
        sys.stdout.flush()
        return status
    except UsageError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted.")
        return 130
    except BrokenPipeError:  # `trpo-jax envs | head`
        drop_output()
        return 0
    except MemoryError:
        say(f"{_TOO_LARGE}.")
        return 2
    except OSError as error:  # a path that no file can have, a full disk, no permission: whatever the command touched
        drop_output()
        where = f"cannot use {shown(error.filename)}" if error.filename else "cannot read or write"
        say(f"{where}: {error.strerror or error}; choose another path, or make room.")
        return 2
    except Exception as error:
        if not (sentence := _sentence_about(error)):
            raise
        say(sentence)
        return 2


def _sentence_about(error: Exception) -> str:
    """The sentence for an exception that JAX or the machine caused; empty if the cause is unknown."""
    _, ours, sentence = str(error).partition("UsageError: ")
    if ours:  # JAX keeps the text of an error in Python code that a program calls
        return sentence.splitlines()[0]
    if "RESOURCE_EXHAUSTED" in str(error):
        return f"{_TOO_LARGE} ({first_line(error)})."
    try:
        import jax

        jax.devices()
    except Exception as why:
        odd = ", ".join(f"{name}={shown(value)}" for name, value in os.environ.items() if name.startswith("JAX_"))
        return f"JAX cannot start ({first_line(why)}); change or unset {odd or 'JAX_PLATFORMS'}."
    return ""


def _prepare_streams() -> None:
    """Let a terminal without Greek letters show question marks, and a closed stream discard its text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
