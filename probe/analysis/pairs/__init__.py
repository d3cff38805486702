"""Which experts go together: within a layer, and from one layer to the next."""
