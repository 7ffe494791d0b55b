"""What an owner keeps on its own disk."""
