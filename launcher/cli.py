"""The ``fulltune`` command: arguments in, exit code out.

A verb is a file of launcher/commands with ``add_arguments(parser)`` and ``run(arguments) -> exit code``. Only the file
of the verb in use is imported, so that ``fulltune --help`` answers at once; the summaries therefore stand here.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Any, NoReturn

from engine.errors import INTERNAL, ConfigError, MissingInputError
from engine.file_modes import set_umask

COMMANDS = {
    "prepare": "turn the run file's records into a token store",
    "inspect": "show what a token store holds: tokens, targets, sources, ledger",
    "train": "prepare if needed, then train through `deepspeed`",
    "submit": "write a Slurm batch script for a run and submit it",
    "status": "where runs stand, local ones and Slurm jobs",
    "logs": "what a run has printed",
    "stop": "have a run save a checkpoint and end, for good",
    "doctor": "would a run work on these machines: versions, GPUs, memory, disks, ports, ssh",
    "export": "turn a checkpoint into a Hugging Face folder (no GPU needed)",
    "import": "turn a checkpoint that DeepSpeed itself saved into a Hugging Face folder",
    "eval": "the figures of a model on labelled records",
    "predict": "a model's answer to every record of files: label, tags, score or answer",
    "verify": "read a run's checkpoints and say whether they are what was written",
    "tensorboard": "show runs side by side in TensorBoard, on localhost",
    "generate": "continue prompts with a Hugging Face folder",
    "tokenizer": "train a tokenizer, add pieces to one, or special tokens to a model",
    "model": "get a small real model: minilm (BERT kind) or smollm2 (Llama kind)",
    "demo": "train a small model from nothing on this machine, start to finish",
    "schema": "print the JSON schema of a run file, for editors",
}
_INTERRUPTED = 130
# Python keeps the bytes of such a name as characters that cannot be written into any file.
_NO_TEXT = "the name of a file or folder is no text in this locale: set PYTHONUTF8=1, or rename what is not UTF-8"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. A failure is an exit code and one line on stderr for each finding."""
    words = sys.argv[1:] if argv is None else list(argv)
    umask_before = set_umask(False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still shows something
    try:
        if any("\udc80" <= char <= "\udcff" for text in (_current_folder(), *words) for char in text):
            raise ConfigError(_NO_TEXT)
        arguments = parse(words or ["--help"])
        set_umask(getattr(arguments, "share_with_group", False))
        code: int = arguments.run(arguments)
        return code
    except KeyboardInterrupt:
        print("fulltune: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left, as in `fulltune schema | head`
        return 0
    except Exception as error:
        return _report(error, "--debug" in words)
    finally:
        os.umask(umask_before)


def _report(error: Exception, debug: bool) -> int:
    """Print an error in one line, or one line for each finding in it; its exit code."""
    if debug:
        traceback.print_exc()
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        for line in str(error).splitlines() or [""]:
            print(f"fulltune: error: {' '.join(line.split())}", file=sys.stderr)
        return code
    text = " ".join(str(error).split())
    if isinstance(error, UnicodeEncodeError):
        print(f"fulltune: error: {_NO_TEXT}", file=sys.stderr)
        return ConfigError.exit_code
    if isinstance(error, FileNotFoundError) and not _current_folder():
        print("fulltune: error: the current folder is gone: cd to one that is there", file=sys.stderr)
        return MissingInputError.exit_code
    hint = "" if debug else " (--debug shows where)"
    print(f"fulltune: error: {type(error).__name__}: {text}{hint}", file=sys.stderr)
    return INTERNAL


def _current_folder() -> str:
    """The current folder; "" if somebody has removed it."""
    try:
        return os.getcwd()  # noqa: PTH109 (Path.cwd says no more)
    except OSError:
        return ""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; overrides may stand before, between and after options, which argparse alone refuses."""
    parser = _Parser(prog="fulltune", description="Full-parameter fine-tuning of language models with DeepSpeed.")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    used = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == used:
            module = import_module(f"launcher.commands.{name}{'_' if iskeyword(name) else ''}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments, left = parser.parse_known_args(words)
    late = [word for word in left if "=" in word and not word.startswith("-")]
    if len(late) < len(left) or (late and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if late:
        arguments.overrides = arguments.overrides + late
    return arguments


class _Parser(argparse.ArgumentParser):
    """Every parser has `--debug`. A wrong command line is one line on stderr and exit code 78."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error came from"
        )

    def error(self, message: str) -> NoReturn:
        self.exit(ConfigError.exit_code, f"fulltune: error: {message}; see `{self.prog} --help`\n")


if __name__ == "__main__":
    sys.exit(main())
