"""Verbs outside the pipeline: one file, one function `run` each."""
