"""Which experts go with a behavior: groups compared, and one group described."""
