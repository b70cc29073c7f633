"""The Hub: pruned models are pushed whole, in one commit."""
