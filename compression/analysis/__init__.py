"""What train.py does instead of training: timelines, summaries, sensitivity, post-training quantization."""
