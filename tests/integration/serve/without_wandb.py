"""Imported first by a script: Megatron imports wandb if it is there, a third of the time that a start takes."""

import sys

sys.modules["wandb"] = None  # type: ignore[assignment]  # None: there is no such module
