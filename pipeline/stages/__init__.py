"""One stage a file; `pipeline.registry` lists them in order."""
