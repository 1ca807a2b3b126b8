"""Responses from models: `local.py` decodes in process, `stage.py` is the pipeline's sampling stage."""
