"""Models of user behaviour that can be sampled."""
