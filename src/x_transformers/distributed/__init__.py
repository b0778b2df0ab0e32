"""Training on several processes with PyTorch's engine: meshes, FSDP2, DDP, distributed checkpoints. Imported when used."""
