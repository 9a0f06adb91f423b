"""What a forward pass shows of how a model uses its depth: traces, edits, and measures of both."""
