"""What update t sees, as a function of the seed and t."""
