"""Ranking quality, measured on the whole catalogue."""
