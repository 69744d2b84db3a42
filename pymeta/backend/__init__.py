"""From a model and tasks to the native core: plans, devices, prepared calls."""
