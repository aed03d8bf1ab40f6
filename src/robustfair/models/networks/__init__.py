"""The networks that are ours, a file each."""
