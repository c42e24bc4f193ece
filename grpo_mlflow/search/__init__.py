"""Hyperparameter search that knows about noise. The only package that imports Optuna."""
