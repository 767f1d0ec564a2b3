"""The ground of the launcher: a job's command line, hosts, environment, exit records, processes, run files.

May import engine and data_prep, no other room of the launcher.
Read first: job.py.
"""
