"""Kills real runs and studies at named points, goes on with them, and compares what they leave."""
