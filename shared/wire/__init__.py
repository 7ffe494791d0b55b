"""The messages in which client and server meet."""
