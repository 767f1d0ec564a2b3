"""Full-parameter training from token stores with DeepSpeed ZeRO: sees integers, never text."""
