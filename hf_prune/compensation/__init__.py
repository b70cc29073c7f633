"""Repair without training: the tensors that make up for what left. One file each."""
