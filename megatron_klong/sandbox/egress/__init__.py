"""The only way out of a sandbox: a filtering proxy that enforces a task's blacklist and logs every request."""
