"""DP-SGD by user, at about the price of training without privacy."""
