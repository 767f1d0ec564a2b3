"""Ranks on the hosts of a hostfile: checks before the start, the parent of a rank, messages through the run folder.

May import job.
Read first: ranks.py.
"""
