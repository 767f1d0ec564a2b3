"""Files and Hub data sets as records, each with its place, in parallel spans.

May import only errors, config and progress of data_prep.
Read first: scan.py, then read.py.
"""
