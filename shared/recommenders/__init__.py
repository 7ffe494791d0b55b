"""Recommenders trained at home on real and synthetic users."""
