"""One page that shows what runs did: losses, savings, reasoning by difficulty, primitives, loops at inference, costs."""
