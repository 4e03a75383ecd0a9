"""Files that are written and read back: checkpoints, YAML files, run folders."""
