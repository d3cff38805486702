"""How languages are routed: divergence from a pivot, from one another, and what goes with it."""
