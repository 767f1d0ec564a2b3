"""Evaluations and predictions with a Hugging Face folder outside of a run: a process a device, no DeepSpeed.

May import model, ranks, tasks, batches, figures and what is below them. The launcher starts `worker` once a device;
what it reads and writes is in plan.py, which imports without torch. Read first: plan.py, then worker.py.
"""
