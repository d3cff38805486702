"""What other systems recorded, read into a store; what a store holds, written for other systems."""
