"""The documents that describe a run, as typed objects: data.json, model.json, tools.json and fsdp2_config.yaml.

The classes are the reference documentation of the files: one field for each key, with its type, its default and
one line that says what it does. Nothing here imports torch.
"""
