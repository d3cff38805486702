"""What usage alone answers: load and balance, and which experts a kind of text uses."""
