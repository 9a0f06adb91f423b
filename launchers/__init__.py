"""Starting runs: local ranks now, Slurm jobs later."""
