"""The networks, one file a family. These modules import PyTorch; `models.py` does not."""
