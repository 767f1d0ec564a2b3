"""From a checked run file to a started job: where ranks run, the dry run, the checks, restarts.

May import batch, supervision, ssh and job.
Read first: start.py.
"""
