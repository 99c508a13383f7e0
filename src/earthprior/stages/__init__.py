"""The verbs of dvc.yaml: one file, one function `run` each."""
