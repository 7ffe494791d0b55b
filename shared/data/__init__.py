"""Users' interactions: read, checked, indexed, split."""
