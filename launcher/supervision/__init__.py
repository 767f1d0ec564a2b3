"""Watches a running job: signals, deaths, hangs, memory kills, and the exit code with its explanation.

May import ssh and job.
Read first: run.py, then supervisor.py.
"""
