"""Rows of files or of the hub, as two splits that share no question."""
