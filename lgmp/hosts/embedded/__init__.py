"""A host of our own for machines without /dev/lguest: the lg module's work in user space."""
