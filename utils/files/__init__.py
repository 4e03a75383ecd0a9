"""What is written and read back: checkpoints, YAML files, run folders."""
