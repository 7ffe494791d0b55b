"""DP-SGD by user."""
