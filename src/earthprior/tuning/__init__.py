"""The search over params.yaml: an Optuna study of trainings, and its page."""
