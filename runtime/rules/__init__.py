"""Exit rules: pure numpy, nothing else."""
