"""A model is a folder: its flags in config.json, its weights in safetensors files."""
