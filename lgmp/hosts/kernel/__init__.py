"""The host of old: the lg module of a kernel before 4.14, by its device /dev/lguest."""
