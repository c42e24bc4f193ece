"""The reports: their pages as text, and in a browser."""
