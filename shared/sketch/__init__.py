"""One-shot statistics of all users under the Gaussian mechanism, and what is built from them."""
