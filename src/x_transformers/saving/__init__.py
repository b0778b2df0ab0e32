"""A model as a folder: its flags in config.json, its weights in safetensors files."""
