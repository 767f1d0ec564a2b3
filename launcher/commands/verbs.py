"""What each command of `fulltune` does with its arguments; all return an exit code. Heavy imports wait inside."""

import argparse
import json
import os
import sys

from engine.errors import ConfigError
from engine.file_modes import set_umask
from launcher.commands.inspect import inspect_store
from launcher.job.run_config import Run, load_run, run_file_schema


def _load(arguments: argparse.Namespace) -> Run:
    """The checked run file; from here on what it says about the group holds."""
    run = load_run(arguments.run_file, arguments.overrides)
    set_umask(run.config.share_with_group)
    return run


def prepare(arguments: argparse.Namespace) -> int:
    """Make the token store, or a share of it."""
    from launcher.start.start import array_part, prepare_store

    prepare_store(_load(arguments), arguments.part or array_part(os.environ))
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Show a token store."""
    return inspect_store(arguments)


def train(arguments: argparse.Namespace) -> int:
    """Plan, or prepare and train."""
    from launcher.start.start import plan_job, start

    run = _load(arguments)
    job = plan_job(
        run,
        ranks=arguments.ranks,
        ranks_per_node=arguments.ranks_per_node,
        hostfile=arguments.hostfile,
        include=arguments.include,
        exclude=arguments.exclude,
        master_port=arguments.master_port,
        engine_flags=[f"--{flag}" for flag in ("fresh", "debug") if getattr(arguments, flag)],
        hang_seconds=arguments.hang_seconds,
    )
    if arguments.dry_run:
        from launcher.start.dry_run import describe_plan

        print(describe_plan(run, job))
        return 0
    code, message = start(run, job, arguments.restarts, arguments.master_port)
    if message:
        print(f"fulltune: {message}", file=sys.stderr)
    return code


def submit(arguments: argparse.Namespace) -> int:
    """Write a batch script and hand it to Slurm."""
    from launcher.commands.submit import check_request, submit

    run = _load(arguments)
    return submit(run, check_request(arguments, run.config.run_dir), arguments.dry_run)


def status(arguments: argparse.Namespace) -> int:
    """Say where runs stand."""
    from launcher.commands.status import show_status

    return show_status(arguments.runs)


def logs(arguments: argparse.Namespace) -> int:
    """Show what a run has printed."""
    from launcher.commands.status import show_logs

    return show_logs(arguments.run_dir, arguments.follow, arguments.rank)


def stop(arguments: argparse.Namespace) -> int:
    """Ask a run to save and end."""
    from launcher.commands.status import stop_run

    return stop_run(arguments.run_dir)


def doctor(arguments: argparse.Namespace) -> int:
    """Say whether a run would work here."""
    from launcher.doctor.doctor import doctor

    return doctor(arguments)


def export(arguments: argparse.Namespace) -> int:
    """A checkpoint becomes a Hugging Face folder."""
    from launcher.commands.export import export_run

    export_run(
        arguments.run_dir, arguments.out_dir, arguments.step, arguments.best, arguments.dtype, arguments.max_shard_size
    )
    return 0


def import_deepspeed(arguments: argparse.Namespace) -> int:
    """DeepSpeed's own checkpoint becomes a Hugging Face folder."""
    from engine.deepspeed_import.convert import import_checkpoint  # brings torch along

    found = import_checkpoint(
        arguments.checkpoint_dir, arguments.out_dir, arguments.model, arguments.tag, arguments.dtype,
        arguments.max_shard_size,
    )  # fmt: skip
    facts = f"step {found.step}, ZeRO-{found.stage}, {found.world_size} ranks, DeepSpeed {found.version}"
    print(f"{found.path} ({facts}) imported to {arguments.out_dir} ({arguments.dtype})")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Read all checkpoints of a run."""
    from launcher.commands.verify import verify_run

    return verify_run(arguments.run_dir)


def tensorboard(arguments: argparse.Namespace) -> int:
    """Show runs in TensorBoard."""
    from launcher.commands.tensorboard import show_runs

    return show_runs(arguments.run_dirs, arguments.port)


def generate(arguments: argparse.Namespace) -> int:
    """Continue prompts."""
    from launcher.commands.generate import generate

    prompts = arguments.prompt if arguments.prompt is not None else [sys.stdin.read().rstrip("\n")]
    if not all(prompts):
        raise ConfigError("the prompt is empty: give --prompt TEXT, or text on stdin")
    for text in generate(
        arguments.model, prompts, arguments.chat, arguments.max_new_tokens, arguments.temperature, arguments.seed
    ):
        print(text, flush=True)
    return 0


def train_tokenizer(arguments: argparse.Namespace) -> int:
    """Train a tokenizer."""
    from launcher.commands.tokenizer import train

    train(arguments.files, arguments.out_dir, arguments.vocab_size, arguments.kind)
    return 0


def extend_tokenizer(arguments: argparse.Namespace) -> int:
    """Add pieces to a tokenizer."""
    from launcher.commands.tokenizer import extend

    extend(arguments.base, arguments.files, arguments.out_dir, arguments.add)
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """Train a small model from nothing."""
    from launcher.commands.demo import run_demo

    return run_demo(arguments.dir)


def schema(_arguments: argparse.Namespace) -> int:
    """Print the JSON schema of a run file."""
    print(json.dumps(run_file_schema(), indent=2))
    return 0
