"""The ``fulltune`` command: arguments in, exit code out. Heavy imports wait inside the commands."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from engine.arithmetic import DEFAULT_SHARD_BYTES, byte_count
from engine.errors import INTERNAL, ConfigError
from engine.file_modes import set_umask
from launcher.commands import verbs as run
from launcher.commands.inspect import add_arguments as add_inspect_arguments
from launcher.commands.submit import add_arguments as add_submit_arguments
from launcher.doctor.table import add_arguments as add_doctor_arguments

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Every failure is one line on stderr and an exit code."""
    arguments = _parse(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    umask_before = set_umask(getattr(arguments, "share_with_group", False))
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print("fulltune: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left, as in `fulltune schema | head`
        return 0
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        code = getattr(error, "exit_code", None)
        if isinstance(code, int):
            print(f"fulltune: error: {_one_line(error)}", file=sys.stderr)
            return code
        hint = "" if arguments.debug else " (--debug shows where)"
        print(f"fulltune: error: {type(error).__name__}: {_one_line(error)}{hint}", file=sys.stderr)
        return INTERNAL
    finally:
        os.umask(umask_before)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand before, between and after options, which argparse alone refuses."""
    parser = build_parser()
    arguments, left = parser.parse_known_args(argv)
    late = [word for word in left if "=" in word and not word.startswith("-")]
    if len(late) < len(left) or (late and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if late:
        arguments.overrides = arguments.overrides + late
    return arguments


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Parser(argparse.ArgumentParser):
    """Its mistakes look like all others: one line, exit code 78."""

    def error(self, message: str) -> NoReturn:
        self.exit(ConfigError.exit_code, f"fulltune: error: {message}; see `{self.prog} --help`\n")


def build_parser() -> _Parser:
    """The whole command line."""
    parser = _Parser(prog="fulltune", description="Full-parameter fine-tuning of language models with DeepSpeed.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    prepare = _add(commands, "prepare", run.prepare, "turn the run file's records into a token store")
    _add_run_file(prepare)
    prepare.add_argument(
        "--part", type=_part, metavar="I/N", help="tokenise only this share of the input, on one of N machines;"
        " afterwards, prepare without it joins them (in a Slurm job array it is taken from the array)",
    )  # fmt: skip

    inspect = _add(commands, "inspect", run.inspect, "show what a token store holds: tokens, targets, sources, ledger")
    add_inspect_arguments(inspect)

    train = _add(commands, "train", run.train, "prepare if needed, then train through `deepspeed`")
    _add_run_file(train)
    train.add_argument("--dry-run", action="store_true", help="print what would happen; write and start nothing")
    train.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine (default: every GPU, or 2 on CPU)")
    train.add_argument(
        "--ranks-per-node", type=_count, metavar="R", help="inside a Slurm job: ranks of each node (default: every GPU)"
    )
    train.add_argument("--hostfile", type=Path, metavar="HOSTS", help="several machines: lines `host slots=N`")
    train.add_argument("--include", metavar="SPEC", help="with --hostfile: use only host1@host2:0,2")
    train.add_argument("--exclude", metavar="SPEC", help="with --hostfile: leave out host1@host2:0,2")
    train.add_argument("--master-port", type=_port, metavar="PORT", help="port where ranks meet (default: a free one)")
    train.add_argument(
        "--restarts", type=_number, default=0, metavar="N",
        help="after a crash or a hang, go on from the newest checkpoint by itself, at most N times",
    )  # fmt: skip
    train.add_argument(
        "--hang-seconds", type=_seconds, default=15.0, metavar="S",
        help="least time without a sign of life in a step that counts as a hang (default 15; 0: never)",
    )  # fmt: skip
    train.add_argument("--fresh", action="store_true", help="start over even if the run folder holds a checkpoint")

    submit = _add(commands, "submit", run.submit, "write a Slurm batch script for a run and submit it")
    _add_run_file(submit)
    add_submit_arguments(submit)

    status = _add(commands, "status", run.status, "where runs stand, local ones and Slurm jobs")
    status.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folders (default: those found here)")

    logs = _add(commands, "logs", run.logs, "what a run has printed")
    logs.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")

    logs.add_argument("--rank", type=int, metavar="N", help="of one rank (default: of the job, or of rank 0)")

    stop = _add(commands, "stop", run.stop, "have a run save a checkpoint and end, for good")
    stop.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")

    summary = "would a run work on these machines: versions, GPUs, memory, disks, ports, ssh"
    add_doctor_arguments(_add(commands, "doctor", run.doctor, summary))

    export = _add(commands, "export", run.export, "turn a checkpoint into a Hugging Face folder (no GPU needed)")
    export.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    export.add_argument("out_dir", type=Path, metavar="OUT", help="folder to write; must not exist")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the best evaluation")
    _add_output_options(export)

    take = _add(
        commands,
        "import",
        run.import_deepspeed,
        "turn a checkpoint that DeepSpeed itself saved into a Hugging Face folder",
    )
    take.add_argument("checkpoint_dir", type=Path, metavar="CHECKPOINT", help="folder with the file `latest`")
    take.add_argument("out_dir", type=Path, metavar="OUT", help="folder to write; must not exist")
    take.add_argument(
        "--model", type=Path, required=True, metavar="MODEL", help="folder with the model's config.json and tokenizer"
    )
    _add_sharing(take)
    take.add_argument("--tag", metavar="NAME", help="such as global_step12 (default: the one that `latest` names)")
    _add_output_options(take)

    verify = _add(commands, "verify", run.verify, "read a run's checkpoints and say whether they are what was written")
    verify.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")

    tensorboard = _add(commands, "tensorboard", run.tensorboard, "show runs side by side in TensorBoard, on localhost")
    tensorboard.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder")
    tensorboard.add_argument("--port", type=int, default=6006, metavar="PORT", help="default 6006; 0: a free one")

    generate = _add(commands, "generate", run.generate, "continue prompts with a Hugging Face folder")
    generate.add_argument("model", metavar="MODEL", help="folder of a causal language model")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable (default: one prompt on stdin)")
    generate.add_argument("--chat", action="store_true", help="the prompt is a user's turn: use the chat template")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling, with --temperature")

    _add_tokenizer(commands)

    demo = _add(commands, "demo", run.demo, "train a small model from nothing on this machine, start to finish")
    demo.add_argument("--dir", type=Path, default=Path("demo"), help="where everything goes (default: ./demo)")

    _add(commands, "schema", run.schema, "print the JSON schema of a run file, for editors")
    return parser


def _add_tokenizer(commands: "argparse._SubParsersAction[_Parser]") -> None:
    summary = "train a tokenizer, or add pieces to one"
    tokenizer = commands.add_parser("tokenizer", help=summary, description=f"{summary.capitalize()}.")
    actions = tokenizer.add_subparsers(metavar="ACTION", required=True)
    train = _add(actions, "train", run.train_tokenizer, "train a tokenizer on text or record files")
    extend = _add(
        actions, "extend", run.extend_tokenizer, "add pieces learned from new text; old pieces keep their ids"
    )
    extend.add_argument("base", metavar="BASE", help="folder or file of the tokenizer, or its name on the Hub")
    for action in (train, extend):
        action.add_argument("files", type=Path, nargs="+", metavar="FILES")
        action.add_argument("out_dir", type=Path, metavar="OUT", help="folder to write")
        _add_sharing(action)
    train.add_argument("--vocab-size", type=_count, required=True, metavar="N", help="number of ids")
    kinds = ["sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"]
    train.add_argument("--kind", choices=kinds, default=kinds[0], help=f"default: {kinds[0]}")
    extend.add_argument("--add", type=_count, required=True, metavar="N", help="number of new pieces")


def _add(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> _Parser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.set_defaults(command=run)
    return parser


def _add_output_options(parser: _Parser) -> None:
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--max-shard-size", type=_byte_count, default=DEFAULT_SHARD_BYTES, metavar="SIZE", help="default 5GB"
    )


def _add_sharing(parser: _Parser) -> None:
    """For commands without a run file, where the key of that name says it."""
    parser.add_argument(
        "--share-with-group", action="store_true", help="let the group read and write OUT; else its owner alone can"
    )


def _add_run_file(parser: _Parser) -> None:
    parser.add_argument("run_file", type=Path, metavar="RUN.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example optimizer.learning_rate=2e-5"
    )


def _count(text: str) -> int:
    if not text.replace("_", "").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"write a positive number, not {text}")
    return int(text)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"write a number, not {text}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"write a port from 1 to 65535, not {text}")
    return int(text)


def _seconds(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"write a number of seconds, not {text}")
    return float(text)


def _part(text: str) -> tuple[int, int]:
    """`2/8`: the second of eight shares."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"write a share such as 2/8, not {text}")
    return int(first), int(count)


def _byte_count(text: str) -> int:
    try:
        return byte_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
