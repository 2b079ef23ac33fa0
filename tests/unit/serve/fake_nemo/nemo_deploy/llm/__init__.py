"""See nemo_deploy."""
