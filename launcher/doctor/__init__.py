"""The parts of `fulltune doctor`: collect facts of every node, check them against the run, measure, print a table.

May import job, batch, ssh and start of the launcher, engine and data_prep.
Read first: gather.py (facts), then judge_node.py (checks); commands/doctor.py puts them together.
"""
