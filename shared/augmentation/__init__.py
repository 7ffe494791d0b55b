"""Synthetic users: drawn, weighted, traced."""
