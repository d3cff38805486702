"""The demo models: their world, their training, their cards."""
