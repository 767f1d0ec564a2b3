"""Run files to start from, one for each task."""
