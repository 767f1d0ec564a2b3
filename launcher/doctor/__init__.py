"""`fulltune doctor`: collects facts of every node, checks them against the run, prints a table.

May import job, batch, ssh and start of the launcher, engine and data_prep.
Read first: doctor.py, then gather.py (facts) and judge_node.py (checks).
"""
