"""Layers, losses, optimisers and schedules described as plain data.

One description of each serves the torch module, the native core, files and messages. Only
`network` needs torch.
"""
