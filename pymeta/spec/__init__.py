"""What is meant, as plain data: layers, losses, optimisers, schedules.

One description of each serves the torch module, the native core, files and messages. Only
`network` needs torch.
"""
