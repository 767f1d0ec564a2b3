"""DeepSpeed configurations that are tested with this version."""
