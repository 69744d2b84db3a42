"""The tasks of one call: all checks of what users give, and the three forms that tasks come in."""
