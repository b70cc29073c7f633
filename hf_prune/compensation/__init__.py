"""Repair in closed form: the tensors that make up for what left. One file each."""
