"""Virtio without any I/O: rings, numbers, and the requests of each device, for whoever is on either side."""
