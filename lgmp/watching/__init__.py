"""The commands that look at running guests and tell them what to do, from outside, by their control sockets."""
