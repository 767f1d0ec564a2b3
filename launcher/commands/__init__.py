"""The verbs of `fulltune`, one file a verb: `add_arguments(parser)`, and `run(arguments)` which returns the exit code.

May import every other room of the launcher, engine and data_prep; `launcher.cli` imports the file of the verb in use.
Read first: train.py.
"""
