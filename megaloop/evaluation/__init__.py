"""What a checkpoint can do: reasoning primitives, held-out loss, and any task of EleutherAI's harness."""
