"""Inside a Slurm allocation: nodes, one task a rank through `srun`, the parent of each rank.

May import supervision, ssh and job.
Read first: slurm_job.py.
"""
