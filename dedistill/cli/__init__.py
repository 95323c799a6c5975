"""The commands: ``dedistill COMMAND``, ``python -m dedistill COMMAND``. Nothing heavy is imported before it is needed."""
