"""``fulltune import``: turn a checkpoint that DeepSpeed itself saved into a Hugging Face folder.

The file is not called `import`, which is a keyword of Python.
"""

import argparse
from pathlib import Path

from launcher.commands.arguments import add_sharing, add_weight_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the folder to write, and the model's configuration, which such a checkpoint lacks."""
    parser.add_argument("checkpoint_dir", type=Path, metavar="CHECKPOINT", help="folder with the file `latest`")
    parser.add_argument("out_dir", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="MODEL", help="folder with the model's config.json and tokenizer"
    )
    add_sharing(parser)
    parser.add_argument("--tag", metavar="NAME", help="such as global_step12 (default: the one that `latest` names)")
    add_weight_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Import the checkpoint and print what it was."""
    from engine.deepspeed_import.convert import import_checkpoint  # imports torch

    found = import_checkpoint(
        arguments.checkpoint_dir, arguments.out_dir, arguments.model, arguments.tag, arguments.dtype,
        arguments.max_shard_size,
    )  # fmt: skip
    facts = f"step {found.step}, ZeRO-{found.stage}, {found.world_size} ranks, DeepSpeed {found.version}"
    print(f"{found.path} ({facts}) imported to {arguments.out_dir} ({arguments.dtype})")
    return 0
