"""minisft: score, select, fine-tune, evaluate, export and chat, in PyTorch that can be read."""
