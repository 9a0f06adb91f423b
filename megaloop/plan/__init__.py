"""What a run will do and cost, told before it starts."""
