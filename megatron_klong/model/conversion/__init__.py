"""Weights from Hugging Face format to Megatron checkpoints and back, as a stream: tools/convert_checkpoint.py."""
