"""The data owner's side."""
