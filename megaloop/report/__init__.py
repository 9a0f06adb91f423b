"""One page that shows what runs did: losses, savings, primitives, loops at inference, costs."""
