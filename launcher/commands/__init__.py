"""The verbs of `fulltune`, one file a verb: its arguments and what it does.

May import every other room of the launcher, engine and data_prep; only `launcher.cli` imports it.
Read first: train.py.
"""
