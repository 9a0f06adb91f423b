"""The process that a rank is: its device, its machine, and what all ranks tell one another."""
