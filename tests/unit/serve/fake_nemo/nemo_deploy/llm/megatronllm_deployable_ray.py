"""See nemo_deploy. What it deploys is not there: imported only to learn why."""

raise ImportError("No module named 'transformer_engine'")
